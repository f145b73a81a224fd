# `snakemake --report FILE` collects the outputs that are marked here (docs/report.md).
report: "../report/workflow.rst"


localrules:
    table,
    report,


rule table:
    input:
        parents,
    output:
        document=f"{RESULTS}/tables/{{id}}.json",
        tidy=report(
            f"{RESULTS}/tables/{{id}}.csv",
            caption="../report/table.rst",
            category="Tables",
            labels=experiment,
        ),
    log:
        f"{RESULTS}/logs/table/{{id}}.log",
    conda:
        "../../environment.yml"
    message:
        "table {wildcards.id}: {params.label}"
    params:
        label=label,
        results=results_folder,
    shell:
        "OMP_NUM_THREADS={threads} python -m espalier table {wildcards.id} --results {params.results:q}"
        " >{log:q} 2>&1 || (tail -n 20 {log:q} >&2; exit 1)"


rule report:
    input:
        parents,
    output:
        page=report(
            f"{RESULTS}/reports/{{id}}.html",
            caption="../report/report.rst",
            category="Reports",
            labels=experiment,
        ),
        figures=report(
            directory(f"{RESULTS}/reports/{{id}}"),
            patterns=["{figure}.svg"],
            caption="../report/figure.rst",
            category="Figures",
            subcategory=label,
            labels={"figure": "{figure}"},
        ),
    log:
        f"{RESULTS}/logs/report/{{id}}.log",
    conda:
        "../../environment.yml"
    message:
        "report {wildcards.id}: {params.label}"
    params:
        label=label,
        results=results_folder,
    shell:
        "OMP_NUM_THREADS={threads} python -m espalier report {wildcards.id} --results {params.results:q}"
        " >{log:q} 2>&1 || (tail -n 20 {log:q} >&2; exit 1)"
