"""Files that are no routing of the model: each is refused with what is wrong, and nothing of it is run or believed."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remoe_cli.errors import UsageError
from remoe_cli.profile.imports import torch_file
from remoe_cli.profile.imports.importer import import_routing
from tests.support import routing_files as made
from tests.support.routing_files import SPEC, Array

IDS = made.make_ids()
COUNTS = made.count(IDS)


def npz(**arrays: Array) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.savez(folder / "x.npz", **arrays)
        return folder / "x.npz"

    return write


def changed(array: Array, at: tuple[int, ...], value: float, dtype: Any = None) -> Array:
    out = array.astype(dtype or array.dtype)
    out[at] = value
    return out


def moved(row: int, layer: int) -> Array:
    """Counts of which one row has a token too many in one layer."""
    out = COUNTS.copy()
    out[row, layer, 3] += 2
    return out


def csv(text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "x.csv").write_text(text, encoding="utf-8")
        return folder / "x.csv"

    return write


def jsonl(row: int, change: Callable[[dict[str, Any]], object], rows: list[dict[str, Any]] | None = None) -> Callable[[Path], Path]:
    lines = json.loads(json.dumps(rows or made.vllm_lines(IDS)))
    change(lines[row])
    return lambda folder: made.write_lines(folder / "x.jsonl", lines)


def dump(value: dict[str, Any], **changes: Any) -> Callable[[Path], Path]:
    return lambda folder: made.save_torch(folder / "x.pt", value | changes)


def record(value: dict[str, Any], number: int, **changes: Any) -> Callable[[Path], Path]:
    records = [entry | (changes if at == number else {}) for at, entry in enumerate(value["records"])]
    return dump(value, records=records)


OFFSETS = made.offsets()
TABLE = made.table(COUNTS)
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "experts": (npz(counts=COUNTS[:, :, :7]), "7 experts a layer, and the model has 8"),
    "layers": (npz(counts=COUNTS[:, [0, 0, 0, 0]]), "4 layers, and the model has 2 with experts among 3"),
    "layer names": (npz(counts=COUNTS, layers=np.array([1, 7])), r"layers \[1, 7\] are not among the model's 2 MoE layers"),
    "layers twice": (npz(counts=COUNTS, layers=np.array([2, 2])), "do not name 2 different layers"),
    "axes": (npz(counts=COUNTS[0]), r"shape \(2, 8\), and \[rows, layers, experts\] is needed"),
    "negative": (npz(counts=changed(COUNTS, (1, 0, 3), -1)), r"counts\[1, 0, 3\]: -1 is not a whole number"),
    "fraction": (npz(counts=changed(COUNTS, (2, 1, 0), 0.5, np.float32)), r"counts\[2, 1, 0\]: 0.5 is not a whole number"),
    "nan": (npz(counts=changed(COUNTS, (0, 1, 7), np.nan, np.float16)), r"counts\[0, 1, 7\]: nan is not a whole number"),
    "too many": (npz(counts=changed(COUNTS, (0, 0, 0), 2**40)), r"counts\[0, 0, 0\]: 1099511627776 is not a whole number"),
    "texts": (npz(counts=COUNTS.astype(str)), "it holds <U21, not whole numbers"),
    "objects": (npz(counts=COUNTS.astype(object)), "damaged"),
    "sums of layers": (npz(counts=moved(1, 1)), r"counts\[1\]: layer 2 sums to 20, which does not fit a sum of 18 in layer 1"),
    "sums and tokens": (npz(counts=COUNTS, n_tokens=np.array([5, 9, 5])), r"counts\[2\]: layer 1 sums to 8, which does not fit 5 tokens"),
    "top-k": (npz(counts=COUNTS // 2), "does not fit"),
    "one expert too often": (npz(counts=np.eye(8, dtype=int)[[[0, 0]]] * 4), "expert 0 of layer 1 is chosen 4 times for 2 tokens"),
    "token numbers": (npz(counts=COUNTS, n_tokens=np.array([5, 9])), r"3 rows have token numbers of shape \(2,\)"),
    "no rows": (npz(counts=COUNTS[:0]), "it has no rows"),
    "empty row": (npz(counts=COUNTS * np.array([1, 0, 1])[:, None, None]), "row 1 holds no routing"),
    "phases of other rows": (npz(prefill_counts=COUNTS, decode_counts=COUNTS[:2]), "prefill and decode differ in their rows"),
    "two kinds": (npz(counts=COUNTS, ids=IDS), "it holds counts, ids"),
    "nothing known": (npz(numbers=COUNTS, more=IDS), r"it holds no routing \(it has the arrays numbers, more\)"),
    "zeros of ids": (npz(ids=np.zeros_like(IDS)), "all layers have the same ids for every token, so it holds no routing"),
    "zeros of counts": (npz(counts=np.zeros_like(COUNTS)), "row 0 holds no routing"),
    "k": (npz(ids=IDS[:, :, :1]), "1 experts a token, and the model chooses 2"),
    "id too large": (npz(ids=changed(IDS, (4, 1, 0), 8)), r"ids\[4\]: layer 2 has expert 8, and ids go from 0 to 7"),
    "id missing": (npz(ids=changed(IDS, (4, 1, 0), -1)), r"ids\[4\]: layer 2 has expert -1"),
    "id below": (npz(ids=changed(IDS, (4, 1, 0), -2)), r"ids\[4, 1, 0\]: -2 is not a whole number"),
    "id twice": (npz(ids=changed(IDS, (6, 0), 5)), r"ids\[6\]: layer 1 has expert 5 twice"),
    "offsets end": (npz(ids=IDS, seq_offsets=OFFSETS - [0, 0, 0, 1]), "goes from 0 to 17, and the tokens from 0 to 18"),
    "offsets order": (npz(ids=IDS, seq_offsets=np.array([0, 9, 5, 18])), r"seq_offsets\[2\]: it is less than the one before"),
    "prompt lengths": (
        npz(ids=IDS, seq_offsets=OFFSETS, prompt_tokens=np.array([1, 10, 1])),
        "row 1: 10 prompt tokens are more",
    ),
    "expert of a table": (csv(TABLE.replace("task1,2,7,", "task1,2,8,")), "row 33: expert 8 is not one of the model's 8"),
    "layer of a table": (csv(re.sub(r"(task\d),2,", r"\1,9,", TABLE)), r"layers \[1, 9\] are not among"),
    "count of a table": (csv(TABLE.replace("task0,1,0,", "task0,1,0,-")), "row 2: its selections is '-"),
    "row twice": (csv(TABLE + TABLE.splitlines()[20] + "\n"), "row 50: expert 3 of layer 1 comes a second time for task1"),
    "row of a table gone": (csv("\n".join(line for line in TABLE.splitlines() if "task1,2,0" not in line)), "does not fit"),
    "row cut": (csv(TABLE + "task1,2"), "row 50: 2 values for the 5 columns"),
    "header alone": (csv(TABLE.splitlines()[0]), "a header and no rows"),
    "no counts": (csv("layer,expert,weight\n1,2,0.5\n"), "none of selections"),
    "k of a table": (csv(made.table(COUNTS, extra={"k": "3"})), "row 2: its k is 3, and the model chooses 2"),
    "base64": (jsonl(1, lambda row: row["choices"][0].update(routed_experts="?")), "row 2: its routed_experts cannot be read"),
    "no experts": (
        lambda folder: made.write_lines(folder / "x", [{"choices": [{"routed_experts": None, "text": "x"}]}] * 3),
        r"row 1: it has no routed_experts but null or zeros, nor has any other response of the file \(it has choices\)",
    ),
    "no response": (
        lambda folder: made.write_lines(folder / "x", [*made.vllm_lines(IDS), {"prompt": "x", "\x1b[2J": 1}]),
        r"row 4: it has no routed_experts, and is no response \(it has prompt, \\x1b\[2J\)",
    ),
    "failed": (
        lambda folder: made.write_lines(folder / "x", [{"error": {"message": "x"}}, {"response": {"status_code": 500, "body": None}}]),
        "row 1: its request failed, and so did all others",
    ),
    "zeros": (
        lambda folder: made.write_lines(folder / "x", made.vllm_lines(np.zeros_like(IDS))),
        "row 1: it has no routed_experts but null or zeros",
    ),
    "no prompt length": (
        jsonl(0, lambda row: row.pop("usage")),
        r"row 1: it does not say how many tokens its prompt has \(it has index, text, routed_experts, id, choices\)",
    ),
    "length": (
        jsonl(0, lambda row: row["usage"].update(completion_tokens=9)),
        "row 1: it has experts of 5 tokens for 3 prompt",
    ),
    "answers": (
        jsonl(1, lambda row: row["choices"].append(row["choices"][0] | {"index": 1})),
        "row 2: its 2 answers have experts of 6 tokens after the prompt, and it states 4 generated ones",
    ),
    "prompts": (
        jsonl(0, lambda row: row.update(choices=row["choices"] * 2, usage={"prompt_tokens": 8, "completion_tokens": 6})),
        "row 1, answer 1: it has experts of 5 tokens for 8 prompt tokens and some generated ones",
    ),
    "parts": (
        jsonl(1, lambda row: row.update(usage={"prompt_tokens": 6, "completion_tokens": 9}), made.vllm_split_lines(IDS)),
        "row 2: it has experts of 3 generated tokens, and its answer has 9",
    ),
    "shape of data": (
        jsonl(0, lambda row: row["choices"][0].update(routed_experts={"data": "AAAA", "shape": [2**40, 2, 2], "dtype": "int8"})),
        "row 1: its routed_experts cannot be read .*3 bytes of data are no array",
    ),
    "objects of data": (
        jsonl(0, lambda row: row["choices"][0].update(routed_experts={"data": "", "shape": [0, 2, 2], "dtype": "object"})),
        "row 1: its routed_experts cannot be read",
    ),
    "start": (
        jsonl(0, lambda row: row["choices"][0].update(routed_experts_start_len=-1)),
        "row 1: its routed_experts_start_len are -1, not a number of tokens",
    ),
    "ragged": (jsonl(1, lambda row: row["prompt_routed_experts"][0].pop(), made.vllm_split_lines(IDS)), "row 2: .* cannot be read"),
    "not json": (lambda folder: write_text(folder, '{"choices": [\n'), "row 1: not JSON"),
    "no object": (lambda folder: write_text(folder, "{}\n[]"), "row 1: it has no routed_experts"),
    "no json later": (jsonl(0, lambda row: None, [{"error": 1}, {"error": float("nan")}]), "row 1: its request failed"),
    "line cut": (lambda folder: write_text(folder, '{"error": 1}\n{"error": \n{"error": 1}\n'), "row 2: not JSON"),
    "array cut": (lambda folder: write_text(folder, '[{"error": 1},\n{"error": 1}'), "row 2: not JSON|row 3: not JSON"),
    "no comma": (lambda folder: write_text(folder, '[{"error": 1} {"error": 1}]'), "row 2: not JSON .a comma or ] is missing"),
    "deep": (lambda folder: write_text(folder, '{"a":' + "[" * 100_000), r"row 1: not JSON \(nested too deeply\)"),
    "deep array": (lambda folder: write_text(folder, "[" * 100_000), r"row 1: not JSON \(nested too deeply\)"),
    "lists of lists": (lambda folder: write_text(folder, "[[[{}]]]"), "row 1, response 1: a JSON list, not an object"),
    "empty array": (lambda folder: write_text(folder, "[]"), "it holds no responses"),
    "other dump": (dump({"weights": torch.zeros(3)}), "no dump of SGLang's expert distribution recorder"),
    "other layers": (dump(made.sglang_stat(COUNTS), logical_count=torch.zeros((2, 5, 8), dtype=torch.int32) + 1), "5 layers"),
    "map": (dump(made.sglang_per_pass(COUNTS), last_physical_to_logical_map=torch.full((3, 9), 8)), "does not fit 8 experts"),
    "pass": (record(made.sglang_per_pass(COUNTS), 1, global_physical_count=torch.zeros((3, 8))), r"record 1: .* shape \(3, 8\)"),
    "no records": (dump(made.sglang_per_token(IDS), records=[]), "its 0 records hold no routing"),
    "idle records": (dump(made.sglang_per_token(IDS), records=[None, {}, {"forward_mode": 4}]), "its 3 records hold no routing"),
    "odd record": (dump(made.sglang_per_token(IDS), records=[[1]]), r"record 0: it has no .* with 2 axes \(it has nothing\)"),
    "mode": (record(made.sglang_per_token(IDS), 2, forward_mode=3), "record 2: its forward mode is neither"),
    "other entries": (dump({"weights": torch.zeros(3)}), r"it holds weights\)"),
    "no entries": (lambda folder: made.save_torch(folder / "x.pt", []), r"it holds list\)"),
    "entry of a record": (record(made.sglang_per_token(IDS), 1, topk_ids_of_layer=None), r"record 1: .* \(it has forward_pass_id, rank"),
    "module": (dump({"logical_count": torch.nn.Linear(2, 2)}), "holds a torch.nn.modules.linear.Linear, which is not plain data"),
    "numpy": (dump({"logical_count": np.zeros(2)}), "holds a numpy._core.multiarray._reconstruct, which is not plain data"),
    "bytes without end": (dump({"logical_count": bytearray(2)}), "holds a __builtin__.bytearray, which is not plain data"),
    "bfloat16": (dump(made.sglang_stat(COUNTS), logical_count=torch.zeros((2, 3, 8), dtype=torch.bfloat16)), "is no array of numbers"),
    "sparse": (dump({"logical_count": torch.zeros((1, 3, 8)).to_sparse()}), "is no array of numbers"),
    "empty": (lambda folder: write_text(folder, ""), "its format is not known"),
    "text": (lambda folder: write_text(folder, "hello"), "its format is not known"),
    "folder": (lambda folder: folder, "it cannot be read"),
    "nowhere": (lambda folder: folder / "nothing.npz", "it cannot be read"),
}


def write_text(folder: Path, text: str) -> Path:
    (folder / "x").write_text(text)
    return folder / "x"


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_is_wrong(name: str, tmp_path: Path) -> None:
    write, message = REFUSED[name]
    with pytest.raises(UsageError, match=message) as raised:
        import_routing(write(tmp_path), SPEC)
    assert raised.value.hint


def bomb(shape: tuple[int, ...]) -> bytes:
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


@pytest.mark.parametrize("shape", [(2**40, 2, 8), (2**62, 2**62, 8), (3, 2, -8), (3, 2, 8)])
def test_a_header_is_not_believed(shape: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(bomb(shape))
    with pytest.raises(UsageError, match=r"damaged .*does not fit"):
        import_routing(tmp_path / "x.npy", SPEC)


def test_a_small_dump_cannot_name_more_than_it_holds(tmp_path: Path) -> None:
    made.save_torch(tmp_path / "x.pt", {"logical_count": torch.zeros(1, dtype=torch.int32).expand(2**20, 2**10, 2**10)})
    with pytest.raises(UsageError, match="more values than the file stores for it"):
        import_routing(tmp_path / "x.pt", SPEC)
    for name, whole in (("global_physical_count", made.sglang_per_pass(COUNTS)), ("topk_ids_of_layer", made.sglang_per_token(IDS))):
        one = {**whole["records"][0], name: whole["records"][0][name].repeat_interleave(40, dim=-1)}
        made.save_torch(tmp_path / "x.pt", whole | {"records": [one] * 1000})
        with pytest.raises(UsageError, match=f"more values in {name} than the file stores"):
            import_routing(tmp_path / "x.pt", SPEC)


def zipped(file: Path, change: Callable[[str, bytes], bytes], *, compression: int = zipfile.ZIP_STORED, twice: str = "") -> None:
    """Write the archive again, its members changed."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))
            if twice and name.endswith(twice):
                archive.writestr(f"other/{twice}", data)


def test_an_archive_that_torch_did_not_write(tmp_path: Path) -> None:
    file = made.save_torch(tmp_path / "x.pt", made.sglang_stat(COUNTS))
    good = file.read_bytes()
    zipped(file, lambda _, data: data)
    assert import_routing(file, SPEC).rows == 3
    zipped(file, lambda _, data: data, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UsageError, match="a compressed archive"):
        import_routing(file, SPEC)
    file.write_bytes(good)
    zipped(file, lambda _, data: data, twice="data.pkl")
    with pytest.raises(UsageError, match=r"2 members named data\.pkl"):
        import_routing(file, SPEC)
    counts = made.sglang_stat(COUNTS)["logical_count"].numpy().tobytes()
    file.write_bytes(good.replace(counts, b"\x02" + counts[1:]))
    with pytest.raises(UsageError, match="member x/data/0 is damaged"):
        import_routing(file, SPEC)
    file.write_bytes(good)
    zipped(file, lambda name, data: data.replace(b"}", b"\x8f", 1) if name.endswith("data.pkl") else data)  # a set
    with pytest.raises(UsageError, match=r"torch\.load\(weights_only=True\) cannot read it \(Can only SETITEMS"):
        import_routing(file, SPEC)


def test_the_description_of_a_dump_has_a_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = made.save_torch(tmp_path / "x.pt", made.sglang_stat(COUNTS))
    for name, least in (("_MOST_OPCODES", 10), ("_MOST_DESCRIPTION_BYTES", 100)):
        with monkeypatch.context() as patched:
            patched.setattr(torch_file, name, least)
            with pytest.raises(UsageError, match=r"its data\.pkl is too large"):
                import_routing(file, SPEC)
    assert import_routing(file, SPEC).rows == 3


def test_nothing_of_a_pickle_is_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    made.save_torch(tmp_path / "x.pt", {"logical_count": Trap()})
    with pytest.raises(UsageError, match=r"holds a __builtin__\.getattr, which is not plain data"):
        import_routing(tmp_path / "x.pt", SPEC)
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "sprung").exists(), "the trap works"
