"""The pages: README's snippets run as they stand, and links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from configure import ROOT

import cute_kernels

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SNIPPETS = dict(
    re.findall(
        r"<!-- snippet: (.+?) -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S
    )
)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    plain = (re.sub(r"\[(.+?)\]\(.+?\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        known = target.exists() and (not anchor or anchor in anchors(target))
        broken += [] if known else [link]
    assert broken == []


def test_every_page_is_linked_from_readme():
    linked = re.findall(r"\]\((docs/\w+\.md|\w+\.md)", (ROOT / "README.md").read_text())
    pages = {page.relative_to(ROOT).as_posix() for page in PAGES} - {"README.md"}
    assert pages - set(linked) == set()


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs" / "api.md").read_text()
    public = set(cute_kernels.__all__) - {"__version__"}
    assert public - set(re.findall(r"`(\w+)`", reference)) == set()


def run(snippet: str) -> dict:
    """What it leaves behind, on the CPU."""
    names: dict = {"torch": torch}
    torch.manual_seed(0)
    exec(SNIPPETS[snippet].replace('device="cuda"', 'device="cpu"'), names)
    return names


def test_readme_trains():
    names = run("train")
    assert all(names[name].grad.isfinite().all() for name in "qk")
    # The weights that its key was given, over all keys: 1 for each row, channel and call.
    of_v = names["v"].grad.double().sum().item()
    assert of_v == pytest.approx(2 * names["q"].numel(), rel=1e-2)


def test_readme_serves():
    names = run("serve")
    q, k_cache, v_cache = names["q"], names["k_cache"], names["v_cache"]
    for i, length in enumerate([101, 501]):
        rows = names["page_table"][i].long()
        k, v = (x[rows].flatten(0, 1)[:length].double() for x in (k_cache, v_cache))
        assert torch.equal(k[-1].bfloat16(), names["k"][i, 0])
        scores = torch.einsum("hgd,khd->hgk", q[i, 0].double().unflatten(0, (4, 4)), k) / 128**0.5
        expected = torch.einsum("hgk,khd->hgd", scores.softmax(-1), v).flatten(0, 1)
        assert (names["out"][i, 0] - expected).abs().max() < 2e-2


def test_readme_attends_in_8_bits():
    names = run("8 bits")
    q, k, v = (names[name].double().transpose(1, 2) for name in "qkv")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    error = (names["out"] - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.05
