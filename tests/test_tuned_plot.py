"""What a search measured, written, read and drawn."""

from xml.etree import ElementTree

import pytest

from cute_kernels import Tuned
from cute_kernels import __main__ as command_line
from cute_kernels.autotune import tuned


def recorded(**changes):
    sizes = {"batch": 2, "seqlen_q": 200, "seqlen_k": 300, "heads": 4, "head_dim": 64}
    kind = {"gpu": "a <GPU>", "headers": "0", "pass": "backward", "dtype": "bf16"}
    samples = {"new": [1e-3, 1.1e-3, 1.2e-3], "old": [2.2e-3], "slow": [4.4e-3, 4.4e-3]}
    found = {
        "kind": {**kind, "sizes": {**sizes, "causal": True}},
        "name": "new",
        "automatic": "old",
        "samples": samples,
        "rows": {name: {"mask": "none" if name == "new" else "any"} for name in samples},
        "refused": {f"reason {i}": i for i in range(1, 8)},
        "failed": {"odd": "wrong for 113 queries", "big": "nvcc does not compile big"},
    }
    return Tuned(**{**found, **changes})


def test_what_was_tried_is_drawn(tmp_path, capsys):
    record, out = tmp_path / "record.json", tmp_path / "tuned.svg"
    runs = [recorded(), recorded(name="old")]
    tuned.write_record(record, runs)
    assert tuned.read_record(record) == runs
    assert command_line.main(["plot", str(record), str(record), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    drawing = ElementTree.parse(out).getroot()
    space = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in drawing.iter(f"{space}text")]
    heading = "backward bf16, head dim 64, causal, 2 x 4 heads of 200 queries and 300 keys, a <GPU>"
    assert texts.count(heading) == 4
    assert [texts.count(name) for name in ("new", "old", "slow")] == [4, 4, 4]
    assert [texts.count(speed) for speed in ("2.000", "1.000", "0.500")] == [4, 4, 4]
    assert texts.count("1 rows did not compile or launch, 1 gave wrong results") == 4
    assert texts.count("     6  for 3 other reasons") == 4
    bars = [element for element in drawing.iter(f"{space}rect") if element.get("height") == "13"]
    legend, panel = bars[:4], bars[4:7]
    colors = {element.get("fill") for element in legend}
    assert len(colors) == 4
    assert {element.get("fill") for element in bars[4:]} == colors
    widths = [float(element.get("width")) for element in panel]
    assert widths == pytest.approx([2 * widths[1], widths[1], widths[1] / 2], abs=0.2)
    width, height = (float(drawing.get(name)) for name in ("width", "height"))
    for element in drawing.iter(f"{space}rect"):
        if element in bars:
            assert float(element.get("x")) + float(element.get("width")) < width
            assert float(element.get("y")) + float(element.get("height")) < height


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"runs": [{"name": 1}]}', '{"runs": 1}'])
def test_what_is_no_record_is_not_drawn(tmp_path, capsys, text):
    path = tmp_path / "record.json"
    path.write_text(text)
    assert command_line.main(["plot", str(path), "--out", str(tmp_path / "tuned.svg")]) == 1
    assert f"{path} is no record of tune" in capsys.readouterr().err
    assert command_line.main(["plot", "none.json"]) == 1
    assert "none.json" in capsys.readouterr().err
