// Sorting and filtering of tables, which are complete without it. Own code, no library; it reads the page, never data.
"use strict";
for (const figure of document.querySelectorAll("figure.sortable")) {
  const table = figure.querySelector("table");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];

  // A cell counts as its first number; cells without one (no value) come last in either direction.
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    if (column === 0) return text;
    const found = text.replace(/(\d),(?=\d{3})/g, "$1").match(/[-+]?\d*\.?\d+(?:e[-+]?\d+)?/i);
    return found ? parseFloat(found[0]) : text.length > 1 ? text : null;
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (before === "descending") { // the third click gives the table's own order back
        body.append(...rows);
        return;
      }
      const sign = before === "ascending" ? -1 : 1;
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const keys = new Map(rows.map((row) => [row, value(row, column)]));
      body.append(...[...rows].sort((one, other) => {
        const [a, b] = [keys.get(one), keys.get(other)];
        if (a === null || b === null) return (a === null) - (b === null);
        return sign * compare(a, b);
      }));
    });
  });

  const bar = document.createElement("div");
  const label = document.createElement("label");
  const input = document.createElement("input");
  const said = document.createElement("output");
  bar.className = "filter";
  input.type = "search";
  input.placeholder = "words of a row";
  label.append("Filter ", input);
  bar.append(label, said);
  figure.querySelector("figcaption").after(bar);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    said.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
  });
}

// What a link leads to opens; on paper everything is open.
const open = (hash) => {
  const target = hash && document.getElementById(hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
};
addEventListener("click", (event) => open(event.target.closest("a")?.hash));
addEventListener("hashchange", () => open(location.hash));
open(location.hash);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
