"""The pages a reader sees. docs/lectures.md: every line of its code runs and prints what the page says, every number of
its text is one that the section's code contains or prints, and every figure is drawn by its script. README.md: its code
runs. Both, and the other pages: what they link to is there."""

import doctest
import re
import sys

import pytest
import torch
from conftest import ROOT

pytest.importorskip("matplotlib")
FIGURES = ROOT / "docs" / "figures"
sys.path.append(str(FIGURES))

import batch_norm  # noqa: E402
import features  # noqa: E402
import gratings  # noqa: E402
import locally_connected  # noqa: E402
import max_pool  # noqa: E402
import receptive_field  # noqa: E402
import sliding  # noqa: E402

PAGE = (ROOT / "docs" / "lectures.md").read_text()
CODE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TINY = {
    sliding: [],
    max_pool: [],
    receptive_field: [],
    locally_connected: [],
    batch_norm: ["--depth", "2"],
    features: ["--data", "synthetic", "--images", "64", "--epochs", "1"],
}


def sections():
    """[(heading, text)] of the page."""
    parts = re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def test_the_code_prints_what_the_page_says():
    source = "\n".join(match.group(1) for match in CODE.finditer(PAGE))
    examples = doctest.DocTestParser().get_doctest(source, {}, "lectures.md", "docs/lectures.md", 0)
    assert len(examples.examples) > 40
    report = []
    failed, _ = doctest.DocTestRunner().run(examples, out=report.append)
    assert not failed, "".join(report)


def numbers(text):
    """The numbers in a text, those within names such as LeNet-5 and CIFAR-10 left out."""
    text = re.sub(r"(?<=\d)[,\u202f\u00a0 ](?=\d{3}\b)", "", text)  # 768 000
    return set(re.findall(r"(?<![\w.-])\d+(?:\.\d+)?", text.replace("×", " ")))


def code_of(section):
    return "".join(match.group(1) for match in CODE.finditer(section))


def prose_of(section):
    """The text without code, images, links' targets and what a script writes."""
    section = re.sub(r"<!-- (\S+) -->.*?<!-- /\1 -->", "", section, flags=re.DOTALL)
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", CODE.sub("", section))


@pytest.mark.parametrize(("heading", "section"), sections(), ids=lambda part: part[:20])
def test_every_number_of_the_text_is_in_the_code_or_what_it_prints(heading, section):
    printed = numbers(code_of(section).replace("**", " "))
    said = numbers(prose_of(section))
    assert said <= printed, f"{heading}: {sorted(said - printed)}"


def test_the_numbers_of_a_text():
    assert numbers("On 7×7, 768 000 of LeNet-5 (0.5) and 27C²; 1 + L") == {"7", "768000", "0.5", "27", "1"}
    text = "a `1`\n```python\n>>> 2\n```\n![x3](4.png)\n<!-- benchmark:lectures -->\n5\n<!-- /benchmark:lectures -->"
    assert prose_of(text).split() == ["a", "![x3"]


def test_the_code_of_the_readme_runs(capsys):
    names = {"model": torch.nn.Conv2d(3, 4, 3), "x": torch.randn(1, 3, 8, 8), "w": torch.randn(4, 3, 3, 3)}
    for match in CODE.finditer((ROOT / "README.md").read_text()):
        exec(match.group(1), names | {"bias": torch.zeros(4)})
    assert "kernel" in capsys.readouterr().out


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))],
                         ids=lambda page: page.name)  # fmt: skip
def test_what_a_page_links_to_is_there(page):
    text = page.read_text()
    headings = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)", text, re.M)}
    for target in re.findall(r"\]\(([^)]*)\)", CODE.sub("", text)):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (page.parent / target).exists(), target


# The figures


def test_the_page_shows_what_the_scripts_write():
    shown = set(re.findall(r"\(figures/([\w-]+\.png)\)", PAGE))
    assert shown == {path.name for path in FIGURES.glob("*.png")} and len(shown) == 7
    assert all(path.stat().st_size < 100_000 for path in FIGURES.glob("*.png"))
    scripts = {path.stem for path in FIGURES.glob("*.py")} - {"figures", "gratings"}
    assert scripts == {script.__name__ for script in TINY} == {re.split(r"[-.]", name)[0] for name in shown}


@pytest.mark.parametrize("script", TINY, ids=lambda script: script.__name__)
def test_a_figure_is_drawn(script, tmp_path):
    script.main([*TINY[script], "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    assert path.name.startswith(script.__name__) and path.read_bytes().startswith(b"\x89PNG")


def test_pixels_are_counted_by_their_windows():
    for stride, padding, dilation in sliding.CASES:
        counts, outputs = sliding.reads(stride, padding, dilation)
        expected = torch.zeros(7 + 2 * padding, 7 + 2 * padding, dtype=torch.int32)
        for p in range(outputs):
            for q in range(outputs):
                rows, columns = (slice(at * stride, at * stride + 2 * dilation + 1, dilation) for at in (p, q))
                expected[rows, columns] += 1
        assert torch.equal(counts, expected[padding : padding + 7, padding : padding + 7])


def test_receptive_fields_grow_by_two():
    assert [receptive_field.seen(layers)[1] for layers in receptive_field.LAYERS] == [3, 5, 7, 11]


def test_locally_connected_units_are_their_definition():
    x, w = torch.randn(2, 3, 5, 6).double(), torch.randn(5, 6, 4, 3, 3, 3).double()
    y = locally_connected.locally_connected(x, w, padding=1)
    padded = torch.nn.functional.pad(x, [1] * 4)
    for n, k, p, q in ((0, 0, 0, 0), (1, 3, 4, 5), (0, 2, 1, 3)):
        expected = (padded[n, :, p : p + 3, q : q + 3] * w[p, q, k]).sum()
        assert torch.isclose(y[n, k, p, q], expected, rtol=1e-12)
    with_shared = locally_connected.locally_connected(x, w[:1, :1].expand(5, 6, -1, -1, -1, -1), padding=1)
    assert torch.allclose(with_shared, torch.nn.functional.conv2d(x, w[0, 0], padding=1), rtol=1e-12)


def test_a_convolution_follows_a_shift_and_locally_connected_units_do_not():
    found = locally_connected.responses()
    left = {
        name: (after - before.roll((locally_connected.SHIFT,) * 2, (2, 3))).abs().max().item()
        for name, (before, after) in found.items()
    }
    assert left["image"] == 0 and left["convolution"] < 1e-4 < 1 < left["locally connected"]


def test_the_pooled_gradient_is_at_the_maxima():
    for kernel, stride in max_pool.CASES:
        x, argmax, y, dx = max_pool.pooled(kernel, stride)
        assert torch.equal(x.flatten()[argmax], y)
        assert torch.equal(dx.flatten().bool().nonzero()[:, 0], argmax.unique()) and dx.sum() == 10


def test_normalized_activations_stay_alike():
    for scale in batch_norm.SCALES:
        assert all(0.5 < x.std() < 0.7 for x in batch_norm.activations(scale, True, 3))
    assert batch_norm.activations(0.5, False, 6)[-1].std() < 0.02


def test_training_learns_the_synthetic_classes(monkeypatch):
    monkeypatch.setattr(features, "BATCH", 16)
    images, labels = gratings.load(320)
    assert images.shape == (320, 3, 32, 32) and labels.unique().tolist() == list(range(gratings.CLASSES))
    model = features.network(3, 32, gratings.CLASSES)
    features.train(model, images, labels, epochs=4)
    assert features.accuracy(model, *gratings.load(200, seed=1)) > 0.5


def test_a_mosaic_has_its_tiles_in_rows():
    tiles = torch.stack([torch.full((2, 2, 1), 0.0), torch.tensor([[[0.0], [1.0]], [[2.0], [4.0]]])] * 2)
    picture = features.mosaic(tiles, 2)
    assert picture.shape == (6, 6, 3)
    assert picture[0, 3:5, 0].tolist() == [0.0, 0.25] and picture[4, 3:5, 2].tolist() == [0.5, 1.0]
    assert picture[2].eq(1).all() and picture[:, 2].eq(1).all()


def test_the_data_is_what_the_folder_has(tmp_path):
    records = torch.randint(0, 256, (4, 3073), dtype=torch.uint8)
    records[:, 0] = torch.tensor([0, 3, 9, 1])
    for name in features.cifar10.TRAINING + features.cifar10.TEST:
        (tmp_path / name).write_bytes(bytes(records.flatten()))
    name, images, labels, test_images, _ = features.load(tmp_path, images=7)
    assert name == "cifar10" and images.shape == (7, 3, 32, 32) and labels.tolist() == [0, 3, 9, 1, 0, 3, 9]
    planes = records[:, 1:].view(4, 3, 32, 32).float()
    mean, deviation = (f.view(3, 1, 1) for f in (planes.mean((0, 2, 3)), planes.repeat(5, 1, 1, 1).std((0, 2, 3))))
    assert torch.allclose(test_images, (planes - mean) / deviation, atol=1e-5)
    (tmp_path / "data_batch_2.bin").write_bytes(bytes(100))
    with pytest.raises(ValueError, match="100 bytes, which are no records of 3073"):
        features.load(tmp_path, images=7)
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match="has no test_batch.bin"):
        features.load(tmp_path, images=7)
    with pytest.raises(SystemExit, match="dataset-fashion-mnist"):
        features.main(["--data", str(tmp_path / "nothing")])
