"""Calibration tokens: made from embedded texts, a file or a hub data set; saved, and read with every check.

`draw: blocks` concatenates the documents of a domain, cuts the whole into blocks of `length` and draws
`samples` of them. `draw: documents` is the recipe of NAEE and HC-SMoE (arXiv 2402.14800, its data/build.py):
shuffle the documents, tokenise the first 16 x samples, pack each 1,000 of them, take the first blocks.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from espalier.artefacts.store import atomic_file, stable_header
from espalier.errors import UserError, nearest
from espalier.inputs import hub
from espalier.inputs.assets import text_directory
from espalier.inputs.calibration_settings import HUB_KEYS, check_calibration
from espalier.inputs.windows import cut_documents, held_out, padded

FORMAT = "espalier.tokens/1"
TOKEN_FILES = (".safetensors", ".npz")
DOCUMENTS_PER_SAMPLE = 16  # of `draw: documents`
DOCUMENTS_PER_PACK = 1000  # the default batch of `datasets.Dataset.map`, whose remainder the recipe drops

Ids = NDArray[np.int32]
Mask = NDArray[np.uint8]
Facts = dict[str, Any]
Tokenise = Callable[[list[str]], list[list[int]]]


def make_tokens(calibration: dict[str, Any], directory: Path) -> tuple[Ids, Mask | None, Facts]:
    """Return input_ids int32 [N, L], a mask uint8 [N, L] or None, and facts about where they come from.

    `calibration` is a conf/calibration YAML; `directory` holds the model's tokenizer. Equal configurations
    and texts give equal tokens. UserError: unknown or wrong keys, texts that are missing or unreadable, fewer
    blocks than `samples`, a `length` beyond the tokenizer's limit, a hub data set without a pinned commit.
    """
    where = f"conf/calibration/{calibration.get('name')}.yaml"
    check_calibration(calibration)
    if calibration["source"] == "file" and Path(str(calibration["path"])).suffix in TOKEN_FILES:
        return load_tokens(Path(calibration["path"]).expanduser(), None)
    length = calibration["length"]
    tokenizer = load_tokenizer(directory)
    if calibration["source"] == "windows":
        return _windows(calibration, tokenizer)
    if length > tokenizer.model_max_length:
        raise UserError(
            f"{where}: length={length} is more than the {tokenizer.model_max_length} tokens of the tokenizer in "
            f"{directory} (model_max_length). Use length <= {tokenizer.model_max_length}."
        )

    def tokenise(texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
        return found

    fields = calibration.get("text", "text")
    fields = (fields,) if isinstance(fields, str) else tuple(fields)
    # A tokenizer that marks no document by itself (GPT-2's kind) gets its end-of-text token between documents.
    separator = [] if tokenise([""])[0] or tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    blocks, facts = [], {}
    for domain, path in _files(calibration, where).items():
        if calibration.get("draw", "blocks") == "documents":
            found, facts[domain] = _draw_documents(calibration, path, fields, tokenise)
        else:
            found, facts[domain] = _draw_blocks(calibration, domain, path, fields, tokenise, separator)
        if len(found) < (calibration["samples"] or 1):
            fewer = f"samples <= {len(found)} or " if len(found) else ""
            raise UserError(
                f"{where}: samples={calibration['samples']} of length={length}, but {path} gives {len(found)} "
                f"blocks ({facts[domain]['tokens']} tokens). Use {fewer}a smaller length."
            )
        blocks.append(found)
    ids = np.concatenate(blocks).astype(np.int32)
    origin = {key: calibration[key] for key in ("name", "source", *HUB_KEYS, "content") if calibration.get(key)}
    return ids, None, origin | {"sequences": len(ids), "tokens": int(ids.size), "texts": facts}


def _windows(calibration: dict[str, Any], tokenizer: Any) -> tuple[Ids, Mask, Facts]:
    """Return the inputs of the windows in which held-out texts are scored, and which of them are no padding."""
    domain = calibration["domains"][0]
    documents = held_out(domain, calibration["name"])
    ids, mask = padded(cut_documents(tokenizer, documents, calibration["length"])[0])
    facts = {key: calibration[key] for key in ("name", "source", "content")}
    facts |= {"sequences": len(ids), "tokens": int(mask.sum()), "texts": {domain: {"documents": len(documents)}}}
    return ids.astype(np.int32), mask.astype(np.uint8), facts


def save_tokens(path: Path, input_ids: Ids, mask: Mask | None, facts: Facts) -> None:
    """Write input_ids int32 [N, L], attention_mask uint8 [N, L] if any, and the facts, as safetensors."""
    tensors: dict[str, NDArray[Any]] = {"input_ids": np.ascontiguousarray(input_ids, dtype=np.int32)}
    if mask is not None:
        tensors["attention_mask"] = np.ascontiguousarray(mask, dtype=np.uint8)
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, {"format": FORMAT, "facts": json.dumps(facts)})
        stable_header(temporary)


def load_tokens(path: Path, vocab_size: int | None) -> tuple[Ids, Mask | None, Facts]:
    """Read `input_ids` [N, L] and optionally `attention_mask` from a .safetensors or .npz file, and the facts.

    UserError: unreadable file, no or wrongly shaped or non-integer `input_ids`, none at all, a negative id, an
    id that the vocabulary of `vocab_size` does not have, a mask of another shape or of other values than 0
    and 1, a sequence that is masked altogether.
    """
    arrays, facts = _read_arrays(path)
    if "input_ids" not in arrays:
        raise UserError(f"{path}: no array input_ids; it has {sorted(arrays)}. Save the token ids as input_ids [N, L].")
    ids, mask = arrays["input_ids"], arrays.get("attention_mask")
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{path}: input_ids is {ids.dtype}, expected integers. Save it as int32 or int64.")
    if ids.ndim != 2 or ids.size == 0:
        raise UserError(f"{path}: input_ids has shape {list(ids.shape)}, expected [N, L] with N >= 1 and L >= 1.")
    limit = np.iinfo(np.int32).max + 1 if vocab_size is None else vocab_size
    for wrong, why in ((ids < 0, "negative"), (ids >= limit, f"beyond the model's vocabulary of {limit}")):
        if wrong.any():
            row, column = np.argwhere(wrong)[0].tolist()
            raise UserError(
                f"{path}: input_ids[{row}, {column}]={ids[row, column]} is {why} ({wrong.sum()} such ids). "
                "Tokenise the calibration with this model's tokenizer."
            )
    if mask is not None:
        if mask.shape != ids.shape:
            raise UserError(
                f"{path}: attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}. Make them equal."
            )
        if not np.isin(mask, (0, 1)).all():
            raise UserError(f"{path}: attention_mask holds {mask.min()} to {mask.max()}, expected 0 and 1 only.")
        empty = np.flatnonzero(~mask.astype(bool).any(axis=1))
        if len(empty):
            raise UserError(f"{path}: attention_mask leaves no token of sequence {empty[0]}. Remove that sequence.")
        mask = mask.astype(np.uint8)
    return ids.astype(np.int32), mask, facts


def load_tokenizer(directory: Path) -> Any:
    """Return the tokenizer of a model directory; UserError when there is none that transformers reads."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{directory}: cannot load a tokenizer ({reason}). Put its tokenizer.json there.") from None
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # made of nothing, for some families (Qwen, OLMoE)
        reason = "the files give one without a vocabulary"
        raise UserError(f"{directory}: cannot load a tokenizer ({reason}). Put its tokenizer.json there.")
    return tokenizer


def _files(calibration: dict[str, Any], where: str) -> dict[str, Path]:
    """Return the text file of each domain, in the order of the configuration."""
    if calibration["source"] == "embedded":
        known = sorted(path.name for path in text_directory().glob("*") if path.is_dir())
        for domain in calibration["domains"]:
            if domain not in known:
                raise UserError(f"{where}: domains: {domain!r} is unknown; {nearest(str(domain), known)}.")
        return {domain: text_directory() / domain / "calibration.jsonl" for domain in calibration["domains"]}
    if calibration["source"] == "file":
        path = Path(str(calibration["path"])).expanduser()
        if calibration.get("_how") and not path.is_file():
            raise UserError(f"{where}: path={path}: no such file. {calibration['_how']}")
        return {path.name: path}
    revision = calibration["revision"]
    if revision is None:
        raise UserError(
            f"{where}: revision is null, so the data set {calibration['id']} is not pinned to a commit. "
            f"Run `espalier pin {calibration.get('name')}` once."
        )
    return {calibration["id"]: hub.data_file(calibration["id"], revision, calibration["file"])}


def _draw_blocks(
    calibration: dict[str, Any],
    domain: str,
    path: Path,
    fields: tuple[str, ...],
    tokenise: Tokenise,
    separator: list[int],
) -> tuple[NDArray[np.int64], Facts]:
    """Cut the concatenated documents into blocks; return those drawn, in the order of the text.

    The draw depends on the seed and the domain's name only: a domain gives the same blocks with or without
    others beside it, and fewer samples are a subset of more.
    """
    length, documents, stream = calibration["length"], 0, []
    for texts in _packs(_texts(path, fields)):
        documents += len(texts)
        for ids in tokenise(texts):
            stream += ids + separator
    blocks = _cut(stream, length)
    order = np.random.default_rng([calibration["seed"], *domain.encode()]).permutation(len(blocks))
    drawn = np.sort(order[: calibration["samples"]])
    facts = {"documents": documents, "tokens": len(stream), "blocks": len(blocks), "drawn": len(drawn)}
    return blocks[drawn], facts


def _draw_documents(
    calibration: dict[str, Any], path: Path, fields: tuple[str, ...], tokenise: Tokenise
) -> tuple[NDArray[np.int64], Facts]:
    """Shuffle the documents and pack the first 16 x samples; return the first blocks.

    The shuffle is that of `datasets.Dataset.shuffle(seed)`: the permutation of numpy's default generator.
    The file is read twice instead of held: the first shard of C4 takes 0.8 GB.
    """
    documents = sum(1 for _ in _texts(path, fields))
    order = np.random.default_rng(calibration["seed"]).permutation(documents)
    order = order[: DOCUMENTS_PER_SAMPLE * calibration["samples"]]
    place = {int(document): n for n, document in enumerate(order)}
    texts = [""] * len(order)
    for n, text in enumerate(_texts(path, fields)):
        if n in place:
            texts[place[n]] = text
    packs, tokens = [], 0
    for pack in _packs(iter(texts)):
        stream = [token for ids in tokenise(pack) for token in ids]
        tokens += len(stream)
        packs.append(_cut(stream, calibration["length"]))
    blocks = np.concatenate(packs) if packs else _cut([], calibration["length"])
    facts = {"documents": documents, "read": len(texts), "tokens": tokens, "blocks": len(blocks)}
    return blocks[: calibration["samples"]], facts


def _packs(texts: Iterator[str]) -> Iterator[list[str]]:
    while pack := list(islice(texts, DOCUMENTS_PER_PACK)):
        yield pack


def _cut(stream: list[int], length: int) -> NDArray[np.int64]:
    """Cut a list of tokens into rows of `length`, without the remainder."""
    count = len(stream) // length
    return np.array(stream[: count * length], dtype=np.int64).reshape(count, length)


def _texts(path: Path, fields: tuple[str, ...]) -> Iterator[str]:
    """Yield the documents of a .txt file (one), a JSON array or JSON lines (`fields` joined by a space).

    A further suffix .gz means gzip. UserError with the line for what is not text, not JSON or has no such field.
    """
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in (".txt", ".json", ".jsonl"):
        raise UserError(f"{path}: not a text that can be read; use .txt, .json, .jsonl, or one of them with .gz.")
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            if kind == ".txt":
                yield file.read()
                return
            first = file.read(1)
            rows = iter(json.loads(first + file.read())) if first == "[" else _json_lines(first, file)
            for number, row in enumerate(rows, start=1):
                missing = [f for f in fields if not isinstance(row, dict) or not isinstance(row.get(f), str)]
                if missing:
                    has = sorted(row) if isinstance(row, dict) else type(row).__name__
                    raise UserError(
                        f"{path}, document {number}: no text in field {missing[0]!r}; it has {has}. Set text."
                    )
                yield " ".join(row[f] for f in fields)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise UserError(
            f"{path}, after document {number}: cannot be read ({error}). Fetch or write it again."
        ) from None


def _json_lines(first: str, file: IO[str]) -> Iterator[Any]:
    for line in file:
        text, first = first + line, ""
        if text.strip():
            yield json.loads(text)


def _read_arrays(path: Path) -> tuple[dict[str, NDArray[Any]], Facts]:
    if path.suffix not in TOKEN_FILES:
        raise UserError(f"{path}: not a token file; use .safetensors or .npz with input_ids [N, L].")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}, {"file": path.name}
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            kind = str(header.get("format", ""))
            if kind.startswith("espalier.") and kind != FORMAT:
                raise UserError(f"{path}: format is {kind!r}, expected {FORMAT}.")
            facts = json.loads(header["facts"]) if kind == FORMAT else {"file": path.name}
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as token ids ({error}). Write it again.") from None
