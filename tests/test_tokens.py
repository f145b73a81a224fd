"""Calibration tokens: the cutting and drawing against plain code, NAEE's recipe against the datasets library."""

import gzip
import json
import re
from itertools import chain

import datasets
import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from espalier import conf
from espalier.errors import UserError
from espalier.inputs import tokens
from espalier.inputs.calibration_settings import check_calibration
from tiny import save_tokenizer

EOS = 2


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tokenizer that adds no token of its own."""
    directory = tmp_path_factory.mktemp("plain")
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory, plain):
    """A tokenizer that begins every text with <s>, as Llama's and Mixtral's do."""
    directory = tmp_path_factory.mktemp("bos")
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(directory)
    return directory


def write_documents(path, count, seed=0, field="text"):
    """`count` documents of 1 to 9 words; returns their token ids."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(3, 95, rng.integers(1, 10)).tolist() for _ in range(count)]
    lines = [json.dumps({"id": str(n), field: " ".join(f"w{w}" for w in d)}) for n, d in enumerate(documents)]
    text = "\n".join(lines) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(text)
    return documents


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Two small embedded domains."""
    monkeypatch.setattr(tokens, "text_directory", lambda: tmp_path / "text")
    return {
        name: write_documents(tmp_path / "text" / name / "calibration.jsonl", 40, seed)
        for seed, name in enumerate(("wiki", "code"))
    }


def embedded(**changes):
    return {
        "name": "e",
        "source": "embedded",
        "domains": ["wiki", "code"],
        "samples": 4,
        "length": 8,
        "seed": 0,
    } | changes


def test_blocks_are_cut_from_the_concatenated_documents(plain, texts):
    ids, mask, facts = tokens.make_tokens(embedded(samples=None), plain)
    expected = []
    for domain in ("wiki", "code"):
        stream = [token for document in texts[domain] for token in [*document, EOS]]
        expected += [stream[n : n + 8] for n in range(0, len(stream) - 7, 8)]
    np.testing.assert_array_equal(ids, expected)
    assert ids.dtype == np.int32
    assert mask is None
    assert facts["tokens"] == ids.size
    assert facts["texts"]["wiki"]["documents"] == 40


def test_a_tokenizer_that_marks_documents_gets_no_other_mark(with_bos, texts):
    ids, _, _ = tokens.make_tokens(embedded(samples=None, domains=["wiki"]), with_bos)
    stream = [token for document in texts["wiki"] for token in [1, *document]]
    np.testing.assert_array_equal(ids.ravel(), stream[: ids.size])


def test_the_draw_is_seeded_nested_and_independent_of_other_domains(plain, texts):
    def draw(**changes):
        return [tuple(row) for row in tokens.make_tokens(embedded(**changes), plain)[0].tolist()]

    both = draw()
    assert len(both) == 8
    assert both == draw()
    assert draw(domains=["wiki"]) == both[:4]
    assert draw(domains=["code", "wiki"]) == both[4:] + both[:4]
    assert set(draw(samples=2)) < set(both)
    assert draw(seed=1) != both
    everything = draw(samples=None)
    assert set(both) < set(everything)
    places = [everything.index(row) for row in both]
    assert places == sorted(places)  # drawn without replacement, kept in the order of the text
    assert len(set(places)) == 8


def hub_calibration(path, samples, length, monkeypatch):
    asked = []
    monkeypatch.setattr("espalier.inputs.hub.data_file", lambda *args: asked.append(args) or path)
    calibration = {
        "name": "c4", "source": "hub", "id": "allenai/c4", "revision": "f" * 40, "file": "en/first.json.gz",
        "draw": "documents", "samples": samples, "length": length, "seed": 42, "content": "f" * 40,
    }  # fmt: skip
    return calibration, asked


def test_the_hub_recipe_equals_the_datasets_library(with_bos, tmp_path, monkeypatch):
    """NAEE's construction, written with `datasets` itself: shuffle, select, map the tokens, map the packing."""
    path = tmp_path / "first.json.gz"
    write_documents(path, 1500)
    calibration, asked = hub_calibration(path, samples=70, length=16, monkeypatch=monkeypatch)
    ids, mask, facts = tokens.make_tokens(calibration, with_bos)
    assert asked == [("allenai/c4", "f" * 40, "en/first.json.gz")]
    assert facts["revision"] == "f" * 40
    assert facts["texts"]["allenai/c4"]["read"] == 1120

    tokenizer = AutoTokenizer.from_pretrained(with_bos)
    with gzip.open(path, "rt") as file:
        data = datasets.Dataset.from_list([json.loads(line) for line in file])
    data = data.shuffle(seed=42).select(range(16 * 70))
    data = data.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns=data.column_names)

    def pack(rows):
        stream = list(chain(*rows["input_ids"]))
        return {"input_ids": [stream[n : n + 16] for n in range(0, len(stream) // 16 * 16, 16)]}

    data = data.map(pack, batched=True, remove_columns=data.column_names)
    np.testing.assert_array_equal(ids, data.select(range(70))["input_ids"])
    assert facts["texts"]["allenai/c4"]["blocks"] == len(data)  # two packs, each without its remainder
    assert mask is None


def test_the_hub_recipe_uses_all_documents_when_there_are_few(with_bos, tmp_path, monkeypatch):
    path = tmp_path / "first.jsonl"
    documents = write_documents(path, 30)
    calibration, _ = hub_calibration(path, samples=3, length=8, monkeypatch=monkeypatch)
    ids, _, _ = tokens.make_tokens(calibration, with_bos)
    order = np.random.default_rng(42).permutation(30)
    stream = [token for n in order for token in [1, *documents[n]]]
    np.testing.assert_array_equal(ids.ravel(), stream[:24])


def test_the_hub_recipe_wants_a_commit(plain):
    calibration = conf.load("calibration", "c4_128x2048") | {"length": 8, "revision": None}
    with pytest.raises(UserError, match=r"revision is null.*allenai/c4.*espalier pin c4_128x2048"):
        tokens.make_tokens(calibration, plain)


def of_file(path, **changes):
    return {"name": "file", "source": "file", "path": str(path), "samples": None, "length": 4, "seed": 0} | changes


def test_a_text_of_ones_own(plain, tmp_path):
    words = [f"w{n}" for n in range(3, 13)]
    expected = [[3, 4, 5, 6], [7, 8, 9, 10]]
    (tmp_path / "a.txt").write_text(" ".join(words))
    (tmp_path / "b.jsonl").write_text(json.dumps({"problem": " ".join(words[:3]), "solution": " ".join(words[3:])}))
    (tmp_path / "c.json").write_text(json.dumps([{"text": " ".join(words)}]))
    for name in ("a.txt", "c.json"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for name in ("a.txt", "a.txt.gz", "c.json", "c.json.gz"):
        np.testing.assert_array_equal(tokens.make_tokens(of_file(tmp_path / name), plain)[0], expected)
    calibration = of_file(tmp_path / "b.jsonl", text=["problem", "solution"])
    np.testing.assert_array_equal(tokens.make_tokens(calibration, plain)[0], expected)


def test_token_ids_of_ones_own_are_taken_as_they_are(plain, tmp_path):
    np.savez(tmp_path / "t.npz", input_ids=np.arange(6).reshape(2, 3), attention_mask=[[1, 1, 0], [1, 1, 1]])
    ids, mask, _ = tokens.make_tokens(of_file(tmp_path / "t.npz"), plain)
    np.testing.assert_array_equal(ids, [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(mask, [[1, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lenght": 8}, r"conf/calibration/e\.yaml: unknown key 'lenght'; did you mean length\?"),
        ({"source": "embeded"}, r"source='embeded'; did you mean embedded\?"),
        ({"domains": ["wki"]}, r"domains: 'wki' is unknown; did you mean wiki\? known: code, wiki"),
        ({"draw": "block"}, r"draw='block'; did you mean blocks\?"),
        ({"samples": 0}, r"samples=0, expected a whole number >= 1"),
        ({"length": 1}, r"length=1, expected a whole number >= 2"),
        ({"seed": None}, r"seed=None, expected a whole number >= 0"),
        (
            {"samples": 1000},
            r"samples=1000 of length=8, but .*wiki.calibration\.jsonl gives \d+ blocks .*Use samples <= ",
        ),
        ({"length": 4096, "samples": None}, r"length=4096, but .* gives 0 blocks"),
    ],
)
def test_mistakes_in_a_calibration_are_one_line(plain, texts, changes, message):
    with pytest.raises(UserError, match=message) as error:
        tokens.make_tokens(embedded(**changes), plain)
    assert "\n" not in str(error.value)


def test_a_length_beyond_the_tokenizer_is_refused(tmp_path, plain, texts):
    tokenizer = AutoTokenizer.from_pretrained(plain, model_max_length=32)
    tokenizer.save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match=r"length=64 is more than the 32 tokens .*Use length <= 32"):
        tokens.make_tokens(embedded(length=64), tmp_path / "short")


def test_a_directory_without_tokenizer(tmp_path, texts):
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        tokens.make_tokens(embedded(), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "w3"}\n{"txt": "w3"}\n',
            r"a\.jsonl, document 2: no text in field 'text'; it has \['txt'\]",
        ),
        ("a.jsonl", b'{"text": "w3"}\n{"text": \n', r"a\.jsonl, after document 1: cannot be read"),
        ("a.jsonl", b"[1, 2]", r"document 1: no text in field 'text'; it has int"),
        ("a.txt", b"\xff\xfe\x00", r"a\.txt, after document 0: cannot be read"),
        ("a.json.gz", b"not gzip", r"a\.json\.gz, after document 0: cannot be read"),
        ("a.json.gz", gzip.compress(b'{"text": "w3 w4"}' * 99, mtime=0)[:-9], r"cannot be read"),
        ("a.parquet", b"", r"a\.parquet: not a text that can be read"),
    ],
)
def test_files_that_cannot_be_read_are_named(plain, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        tokens.make_tokens(of_file(tmp_path / name), plain)


def test_a_missing_file_is_named(plain, tmp_path):
    with pytest.raises(UserError, match=r"gone\.txt: no such file"):
        tokens.make_tokens(of_file(tmp_path / "gone.txt"), plain)
    with pytest.raises(UserError, match=r"gone\.npz: no such file"):
        tokens.make_tokens(of_file(tmp_path / "gone.npz"), plain)


def test_saved_tokens_come_back(tmp_path):
    ids = np.arange(12, dtype=np.int32).reshape(3, 4)
    mask = (ids > 0).astype(np.uint8)
    path = tmp_path / "tokens" / "t.safetensors"
    tokens.save_tokens(path, ids, mask, {"name": "x", "tokens": 12})
    again, mask_again, facts = tokens.load_tokens(path, 12)
    np.testing.assert_array_equal(again, ids)
    np.testing.assert_array_equal(mask_again, mask)
    assert again.dtype == np.int32
    assert facts == {"name": "x", "tokens": 12}
    tokens.save_tokens(path, ids, None, {})
    assert tokens.load_tokens(path, None)[1] is None


def test_tokens_that_other_programs_wrote(tmp_path):
    save_torch({"input_ids": torch.arange(6).view(2, 3)}, tmp_path / "t.safetensors", {"format": "pt"})
    np.savez(tmp_path / "t.npz", input_ids=np.arange(6, dtype=np.uint16).reshape(2, 3))
    for name in ("t.safetensors", "t.npz"):
        ids, mask, _ = tokens.load_tokens(tmp_path / name, 6)
        np.testing.assert_array_equal(ids, [[0, 1, 2], [3, 4, 5]])
        assert ids.dtype == np.int32
        assert mask is None


GOOD = np.arange(6).reshape(2, 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": GOOD}, r"no array input_ids; it has \['ids'\]"),
        ({"input_ids": GOOD.astype(np.float32)}, r"input_ids is float32, expected integers"),
        ({"input_ids": GOOD.astype(bool)}, r"input_ids is bool, expected integers"),
        ({"input_ids": GOOD.ravel()}, r"input_ids has shape \[6\], expected \[N, L\]"),
        ({"input_ids": GOOD[:0]}, r"input_ids has shape \[0, 3\]"),
        ({"input_ids": GOOD - 2}, r"input_ids\[0, 0\]=-2 is negative \(2 such ids\)"),
        ({"input_ids": GOOD + 92}, r"input_ids\[1, 1\]=96 is beyond the model's vocabulary of 96 \(2 such ids\)"),
        ({"input_ids": GOOD, "attention_mask": GOOD[:, :2]}, r"attention_mask has shape \[2, 2\], input_ids \[2, 3\]"),
        ({"input_ids": GOOD, "attention_mask": GOOD}, r"attention_mask holds 0 to 5, expected 0 and 1"),
        ({"input_ids": GOOD, "attention_mask": GOOD // 3}, r"attention_mask leaves no token of sequence 0"),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_wrong_token_files_are_one_line(tmp_path, suffix, arrays, message):
    path = tmp_path / f"t{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    with pytest.raises(UserError, match=message) as error:
        tokens.load_tokens(path, 96)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_unreadable_token_files(tmp_path):
    (tmp_path / "t.npz").write_bytes(b"nothing")
    (tmp_path / "t.safetensors").write_bytes(b"nothing")
    (tmp_path / "t.pt").write_bytes(b"nothing")
    np.savez(tmp_path / "pickled.npz", input_ids=np.array([{}]))
    for name in ("t.npz", "t.safetensors", "pickled.npz"):
        with pytest.raises(UserError, match=f"{re.escape(name)}: cannot be read as token ids"):
            tokens.load_tokens(tmp_path / name, 96)
    with pytest.raises(UserError, match=r"t\.pt: not a token file"):
        tokens.load_tokens(tmp_path / "t.pt", 96)


def test_another_artefact_is_no_token_file(tmp_path):
    save_file({"usage.0.counts": np.zeros(3)}, tmp_path / "s.safetensors", {"format": "espalier.stats/1"})
    with pytest.raises(UserError, match=r"format is 'espalier.stats/1', expected espalier.tokens/1"):
        tokens.load_tokens(tmp_path / "s.safetensors", 96)


@pytest.mark.parametrize("name", conf.names("calibration"))
def test_every_shipped_calibration_has_valid_keys(name):
    calibration = conf.load("calibration", name)
    assert calibration["name"] == name
    check_calibration(calibration)


def test_the_shipped_texts_give_what_the_calibration_says(plain):
    whole, _, facts = tokens.make_tokens(conf.load("calibration", "embedded"), plain)
    assert whole.shape == (64, 256)
    assert list(facts["texts"]) == ["wiki", "code", "maths", "archaic"]
    for name in ("embedded_wiki", "embedded_code", "embedded_maths", "embedded_archaic"):
        ids, _, _ = tokens.make_tokens(conf.load("calibration", name), plain)
        assert ids.shape == (64, 256)


def test_the_recipes_of_the_papers_are_pinned_or_not_at_all():
    for name in ("c4_128x2048", "c4_32x2048"):
        text = (conf.directory() / "calibration" / f"{name}.yaml").read_text()
        assert re.search(r"(?m)^revision: (null|[0-9a-f]{40})$", text)
        assert yaml.safe_load(text)["seed"] == 42
