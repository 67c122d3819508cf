"""The page on families has what the tests try, and nothing else. REMOE_WRITE_GOLDEN=1 writes it anew."""

from __future__ import annotations

import os

import transformers

from remoe_cli.model.foreign_code import ALIASES
from remoe_cli.model.stored import bits_per_weight, is_packed_format
from tests.model.test_published_families import ALSO_PICTURES, OTHER_LAYOUTS
from tests.model.test_quantised import OTHERS
from tests.model.test_spec import UNSERVABLE
from tests.support.families import FAMILIES
from tests.support.paths import ROOT
from tests.support.quantised import FORMATS, PAIRS

PAGE = ROOT / "docs/reference/families.md"
NAMES = {
    "fp8": "FP8 blocks",
    "fp8-channels": "FP8 rows",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "int4": "INT4",
    "int8": "INT8",
}
SAID = {name: form.config or {"quant_method": "modelopt", **(form.beside or {})["quantization"]} for name, form in FORMATS.items()}
STORED = sorted({NAMES[form] for _, form in PAIRS if is_packed_format(bits_per_weight(SAID[form])[0], SAID[form])})
# Families with tests of their own, in tests/model/test_published_families.py.
OWN = {
    "deepseek_v4": ("not tried", "yes", "not tried", "not tried"),
    "longcat_flash": ("yes", "yes", "yes", "yes"),
    **{name: ("yes", "yes", "yes", "yes") for name in OTHER_LAYOUTS},
    "gemma4 (text only)": ("yes", "yes", "not tried", "not tried"),
    **{f"{name} (text only)": ("yes", "yes", "yes", "yes") for name in ALSO_PICTURES},
    **{f"{name} (read as {family})": ("yes, as " + family, "yes", "not tried", "not tried") for name, family in ALIASES.items()},
}
HEAD = f"""# Families and formats

What the tests try with tiny random models, with transformers {transformers.__version__.rpartition(".")[0]}.
`tests/docs/test_families_page.py` makes this page; do not edit it.

- **Tokens**: the answers with half of the experts remote are those of plain transformers.
- **Planned, profiled, served**: by `remoe plan`, by running the model, and by a deployment or its parts.
- **Quantised**: formats whose checkpoints give transformers' weights to the bit. Bold ones are also tried from profile to answer on the
  local twin. Other pairs of a family and a format are not tried; they go through the same code.
- **In functions**, experts in {", ".join(STORED)} are computed as they are stored (packed). In FP8 that is so, or they are
  dequantised first, as the plan finds better. Those in other formats are dequantised first.

Families that are not listed are planned and served in the same way, untried, if they send their experts through transformers' experts
interface.

| family | tokens | planned | profiled | served | quantised |
| --- | --- | --- | --- | --- | --- |
"""


def page() -> str:
    rows = {family: ("yes", "yes", "yes", "yes") for family in FAMILIES} | OWN
    lines = []
    for family, cells in sorted(rows.items()):
        forms = [f"**{NAMES[form]}**" for name, form in PAIRS if name == family]
        forms += [NAMES[form] for name, form in OTHERS if name == family and (name, form) not in PAIRS]
        lines.append(f"| {' | '.join((family, *cells, ', '.join(forms) or 'not tried'))} |\n")
    refused = ", ".join(sorted(UNSERVABLE))
    return HEAD + "".join(lines) + f"\nRefused, because their experts do not go through that interface: {refused}.\n"


def test_the_page_says_what_is_tried() -> None:
    if os.environ.get("REMOE_WRITE_GOLDEN"):
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page(), "REMOE_WRITE_GOLDEN=1 writes it anew; look at the difference"
