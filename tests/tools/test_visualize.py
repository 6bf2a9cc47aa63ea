"""`python -m tools.visualize`: pictures and arrays of every method, from a checkpoint and a folder of images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.decode import decode
from engine.errors import ConfigError
from model import ImageText, StageConfig, TextConfig, VisionTransformer
from model.formats.base import Preprocessing
from model.seeing.trace import map_of, trace
from parallel.process_group import World
from tests.model.small import TINY
from tests.tools.jobs import run_jobs
from tools.convert.images import prepared
from tools.visualize import __main__ as command
from tools.visualize import methods, models
from tools.visualize.methods import EXPLAIN, METHODS, READS
from tools.visualize.of_rows import check, of_heads
from tools.visualize.options import parse_options
from tools.visualize.pictures import Scene, enlarged, names_of
from tools.visualize.shown import Asked
from tools.visualize.texts import METHODS as METHODS_OF_TEXTS

NAMES = ("one.png", "two.png", "sub/one.png")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, and images of other sizes than the model's, one of them grey."""
    folder = tmp_path_factory.mktemp("seeing")
    torch.manual_seed(0)
    model = VisionTransformer(replace(TINY, pool="gap", registers=1, in_channels=3))
    model.save_pretrained(folder / "model")
    texts = TextConfig(width=16, depth=1, num_heads=2, context_length=30)
    pair = ImageText(replace(TINY, pool="map", num_classes=None, in_channels=3), texts, embedding=8)
    pair.save_pretrained(folder / "pair")
    model._description = replace(model._description, embeds=True)
    model.save_pretrained(folder / "tower")
    VisionTransformer(replace(TINY, pool="cls", in_channels=3)).save_pretrained(folder / "cls")
    (folder / "images/sub").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        pixels = (np.arange(20 * 12 * 3).reshape(20, 12, 3) * (7 + i) % 256).astype(np.uint8)
        image = Image.fromarray(pixels)
        (image.convert("L") if i == 1 else image).save(folder / "images" / name)
    return folder


def run(places: Path, out: Path, method: str, *more: str, model: str = "model") -> int:
    argv = ["--checkpoint", str(places / model), "--images", str(places / "images"), "--method", method]
    return command.main([*argv, "--out", str(out), *more], World())


@pytest.fixture(autouse=True)
def _as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "prepare_cpu", lambda world: None)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"masks": "10", "clusters": "3", "batch": "2", "steps": "8"}
    more = [word for name in given if name in READS[method] for word in (f"--{name}", given[name])]
    assert run(places, tmp_path / "out", method, *more) == 0
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    pictures = [f"{method}-{name}.png" for name in ("contact", "one-0", "one-1", "two")]
    assert written == sorted([*pictures, f"{method}.npz"])
    for name in pictures:
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size[0] > 100 and len(picture.convert("RGB").getcolors(10**6) or []) > 20
    arrays = np.load(tmp_path / "out" / f"{method}.npz")
    assert [Path(name).name for name in arrays["images"]] == ["one.png", "one.png", "two.png"]
    assert all(len(arrays[name]) == 3 for name in arrays)
    assert all(np.isfinite(arrays[name]).all() for name in arrays if name != "images")
    said = capsys.readouterr().out
    assert ("entropy" in said) == (method == "heads") and ("variance" in said) == (method == "pca")
    assert ("explained: class" in said) == (method in EXPLAIN) == ("target" in arrays)
    if method in EXPLAIN:
        assert f" {arrays['target'][2]} of two\n" in said
    if method == "heads":
        assert arrays["blocks.1/head 3"].shape == (3, 4, 4) and arrays["blocks.0.entropy"].shape == (3, 4)
    if method == "rollout":  # patches, and the register
        assert np.allclose(arrays["tokens"].sum(1), 1, atol=1e-5)


def test_flow_is_of_a_pyramid_that_keeps_its_tokens() -> None:
    """As that of a student with a projection of its own."""
    first = StageConfig(depth=1, width=16, num_heads=4)
    base = replace(TINY, pool="gap", width=None, depth=None, num_heads=None, mlp_dim=None)
    kept, merged = (
        replace(base, stages=(first, StageConfig(depth=int(merge), width=24, num_heads=4, merge=merge))).resolve()
        for merge in (False, True)
    )
    check("flow", kept, Asked(), images=1)
    with pytest.raises(ConfigError, match="tokens are the same in all layers"):
        check("flow", merged, Asked(), images=1)


def test_of_one_patch_and_some_layers(places: Path, tmp_path: Path) -> None:
    """What that patch attends to, as capture gives it."""
    options = ("--query", "2,1", "--layers", "1", "--heads", "3")
    assert run(places, tmp_path, "heads", *options) == 0
    found = np.load(tmp_path / "heads.npz")
    model = VisionTransformer.from_pretrained(places / "model")
    images = torch.stack(
        [prepared(path, 3, (8, 8), model.preprocessing or Preprocessing()) for path in
         command.images_in(places / "images", 9, tmp_path)]
    )  # fmt: skip
    expected = model.capture(images, layers=[1], heads=[3], queries=[1 + 2 * 4 + 1])["blocks.1"].maps[:, 0, 0]
    assert np.allclose(found["blocks.1/head 3"], expected, atol=1e-6)
    assert map_of(model.config, trace(model, images)[0].start).sum() == pytest.approx(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "method", "more"),
    [
        ("blocks 0 to 1", "heads", ("--layers", "5")), ("heads 0 to 3", "heads", ("--heads", "4")),
        ("4 rows", "mean", ("--query", "4,0")), ("a row and a column", "mean", ("--query", "4")),
        ("classes 0 to 4", "chefer", ("--target", "5")), ("48 patches", "clusters", ("--clusters", "49")),
        ("invalid choice", "gradcam", ()), ("heads 0 to 3", "heads", ("--heads", "-1")),
        ("rollout does not read --layers, --target: .* reads --batch", "rollout", ("--layers", "0", "--target", "1")),
        ("--parallel.*is of a model over several ranks", "rollout", ("--parallel.tensor_parallel_size", "2")),
        ("--nowhere is no option", "rollout", ("--nowhere", "2")), ("blocks 0 to 1", "page", ("--layers", "2")),
        ("--layers 1,0,1 names one twice", "page", ("--layers", "1,0,1")),
        ("--heads 2,2 names one twice", "heads", ("--heads", "2,2")),
    ],
)  # fmt: skip
def test_refusals(words: str, method: str, more: Sequence[str], places: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        run(places, tmp_path, method, *more)


def test_features_of_an_embedding_are_no_classes(places: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"5 features of an embedding.*take --method heads"):
        run(places, tmp_path, "lens", "--target", "1", model="tower")
    assert run(places, tmp_path, "rollout", model="tower") == 0


def test_of_texts(places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A map for each, by the likeness to it; the tokenizer is that of the run, or is given."""
    said = ("--text", "a red, fuzzy thing that goes on for long", "--text", "dé")
    for method in METHODS_OF_TEXTS:
        more = ("--masks", "10") if method == "rise" else ()
        assert run(places, tmp_path, method, *said, *more, "--tokenizer", "bytes", "--batch", "2", model="pair") == 0
        arrays = np.load(tmp_path / f"{method}.npz")
        first, other = (arrays[name] for name in arrays if name.endswith(said[1::2]))
        assert len(first) == 3 and np.abs(first - other).max() > 1e-6 and arrays["similarity"].shape == (3, 2)
        assert (tmp_path / f"{method}-two.png").exists()
    told = capsys.readouterr().out
    assert "two: " in told and "1 of 2 texts are cut: the model reads 30 tokens" in told
    for words, model, method, more in (
        ("does not say how texts become tokens", "pair", "chefer", said),
        ("without a text tower", "model", "chefer", said),
        ("explains no likeness to texts: take gradient", "pair", "rollout", said),
        ("likeness", "pair", "rise", (*said, "--target", "1")),
        ("is of --text", "pair", "rise", ("--tokenizer", "bytes")), ("given twice", "pair", "rise", said[:2] * 2),
        ("--tokenizer=none", "pair", "rise", (*said, "--tokenizer", "none")),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            run(places, tmp_path, method, *more, model=model)


def test_no_images(places: Path, tmp_path: Path) -> None:
    for folder, words in ((tmp_path, "has no image"), (tmp_path / "none", "no such folder")):
        with pytest.raises(ConfigError, match=words):
            command.images_in(folder, 3, tmp_path / "out")
    inside = tmp_path / "maps"
    inside.mkdir()
    for file in (tmp_path / "x.png", inside / "rollout-x.png"):
        file.write_bytes(b"\x89PNG\r\n\x1a\n")
    assert command.images_in(tmp_path, 3, inside) == [tmp_path / "x.png"]
    with pytest.raises(ConfigError, match="is the folder of images"):
        command.images_in(inside, 3, inside)
    with pytest.raises(ConfigError, match=r"x\.png cannot be decoded"):
        command.main(
            ["--checkpoint", str(places / "model"), "--images", str(tmp_path / "x.png"), "--method", "rollout", "--out",
             str(inside)], World(),
        )  # fmt: skip


def test_names_of_pictures_are_their_own() -> None:
    names = names_of([Path(name) for name in ("a/one.png", "b/one.png", "one-1.png", "contact.png", "two.png")])
    assert len(set(names)) == 5 and "contact" not in names and names[-1] == "two"


def test_images_are_decoded_as_in_training(tmp_path: Path) -> None:
    """Turned as EXIF says; grey of colours, and of 16 bits."""
    colors = Image.fromarray((np.arange(16 * 24 * 3).reshape(24, 16, 3) * 5 % 256).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    colors.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray((np.arange(16 * 24).reshape(16, 24) * 170).astype("<u2")).save(tmp_path / "deep.png")
    how = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear")
    for name in ("turned.png", "deep.png"):
        for channels in (1, 3):
            expected = decode(str(tmp_path / name), np.array([1.0, 1.0, 0.5, 0.5]), (channels, 8, 12))
            found = prepared(tmp_path / name, channels, (8, 12), how)
            assert np.allclose(found, expected, atol=1e-6) and expected.std() > 0.01, (name, channels)


def test_heads_that_take_nothing_of_patches_and_half_of_a_class_token() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8)
    probe = METHODS["heads"](VisionTransformer(replace(TINY, pool="map")).eval(), images, Asked())
    assert probe.arrays["head.distance"].isnan().all() and of_heads(probe)[-1].endswith("     - patches")
    model = VisionTransformer(replace(TINY, pool="cls_gap")).eval()
    found = METHODS["mean"](model, images, Asked()).maps["blocks.1", "mean of heads"]
    rows = model.capture(images)["blocks.1"].maps.mean(1)
    assert torch.allclose(found, (rows[:, 0] + rows[:, 1:].mean(1)) / 2, atol=1e-6)


def test_components_are_those_of_ordinary_patches() -> None:
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(2, 4, 4, 8), dim=-1) * (10 + torch.rand(2, 4, 4, 1))
    features[1, 2, 3] *= 1000
    found = methods.pca(features, Asked())
    strange = found.arrays["outliers"]
    assert strange.nonzero().tolist() == [[1, 2, 3]] and found.arrays["components"][strange].abs().max() < 1e-4
    others = features[~strange] - features[~strange].mean(0)
    expected = others @ torch.linalg.svd(others, full_matrices=False)[2][:3].T
    assert torch.allclose(found.arrays["components"][~strange].abs(), expected.abs(), atol=1e-3)


def test_a_map_lies_over_its_own_pixels() -> None:
    """Of 2 x 2 patches of 4 pixels, of which the image does not fill the last; of a later stage; of pixels."""
    scene = Scene("", np.zeros((8, 5, 3), np.float32), 4)
    field = torch.tensor([[0.0, 1], [2, 3]])[..., None]
    grid = enlarged(field, scene, smooth=False)[..., 0]
    times = len(grid) // 8
    assert times > 20 and grid.shape == (8 * times, 5 * times)
    assert (grid[: 4 * times, : 4 * times] == 0).all() and (grid[4 * times :, 4 * times :] == 3).all()
    smooth = enlarged(field, scene, smooth=True)[..., 0]
    assert smooth[0, 0] == 0 and smooth[-1, 0] == 2 and np.isclose(smooth[4 * times - 1 : 4 * times + 1, 0].mean(), 1)
    assert (enlarged(field[:1, :1] + 7, scene, smooth=True) == 7).all()
    pixels = torch.arange(40.0).view(8, 5, 1)
    assert np.array_equal(enlarged(pixels, scene, smooth=False)[::times, ::times], pixels.numpy())


@pytest.mark.parametrize("found", [True, False])
def test_integrated_gradients(found: bool, places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the sum written out, at the points of the same rule; and without captum, in words."""
    if not found:
        monkeypatch.setitem(sys.modules, "captum.attr", None)
        with pytest.raises(ConfigError, match="is captum's, which is not installed: pip install captum"):
            run(places, tmp_path, "integrated_gradients")
        return
    assert run(places, tmp_path, "integrated_gradients", "--target", "2", "--steps", "9", "--batch", "2") == 0
    arrays = np.load(tmp_path / "integrated_gradients.npz")
    model = VisionTransformer.from_pretrained(places / "model")
    paths = command.images_in(places / "images", 9, tmp_path)
    images = torch.stack([prepared(path, 3, (8, 8), model.preprocessing or Preprocessing()) for path in paths])
    total = torch.zeros_like(images)
    for x, weight in zip(*np.polynomial.legendre.leggauss(9), strict=True):
        shown = ((x + 1) / 2 * images).float().requires_grad_()
        total += weight / 2 * torch.autograd.grad(model.logits(shown)[:, 2].sum(), shown)[0]
    assert np.allclose(arrays["attributions"], total * images, atol=1e-5)
    assert np.allclose(arrays["integrated gradients"], (total * images).sum(1), atol=1e-5)
    difference = (model.logits(images) - model.logits(torch.zeros_like(images)))[:, 2]
    missing = arrays["attributions"].sum((1, 2, 3)) - difference.detach().numpy()
    assert np.allclose(arrays["missing"], missing, atol=1e-5)


def test_what_many_ranks_refuse(places: Path, tmp_path: Path) -> None:
    """Before they talk."""
    argv = ["--checkpoint", "x", "--images", "x", "--out", "x", "--method"]
    text = ("--text", "dé", "--tokenizer", "bytes")
    for words, model, method, more in (
        ("classes 0 to 4", "model", "chefer", ("--target", "5")), ("no classes", "pair", "rise", ()),
        ("5 features of an embedding", "tower", "occlusion", ()),
        ("--text is for contrastive", "model", "chefer", text),
        ("without a loss scale.*give --precision.dtype fp32", "model", "chefer", ("--precision.dtype", "fp16")),
        ("does not say how texts", "pair", "chefer", text[:2]), ("lens needs.* pool cls and 5", "cls", "lens", ()),
        ("48 patches", "model", "clusters", ("--clusters", "49")),
    ):  # fmt: skip
        given = ["--checkpoint", str(places / model), "--images", str(places / "images"), "--out", str(tmp_path), *more]
        with pytest.raises(ConfigError, match=words):
            command.main([*given, "--method", method], World(size=2, local_size=2))
    options, flags = parse_options([*argv, "rollout", "--parallel.tensor_parallel_size", "2"], World(size=2))
    assert flags == ["--parallel.tensor_parallel_size", "2"] and options.most == 32


LAYOUTS = {
    "mean": ["--parallel.pipeline_parallel_size", "2"],
    "heads": ["--parallel.tensor_parallel_size", "2", "--parallel.pipeline_parallel_size", "2"],
    "rollout": ["--parallel.context_parallel_size", "2", "--batch", "3"],
    "page": ["--parallel.tensor_parallel_size", "2", "--parallel.sequence_parallel", "true"],
    "chefer": ["--parallel.tensor_parallel_size", "2", "--parallel.pipeline_parallel_size", "2", "--target", "2"],
    "integrated_gradients": ["--parallel.pipeline_parallel_size", "2", "--steps", "5"],
    "rise": ["--parallel.tensor_parallel_size", "2", "--masks", "12"],
    "lens": ["--parallel.context_parallel_size", "2", "--batch", "2"],
    "pca": [],
    "gradient_rollout": [
        "--parallel.tensor_parallel_size", "2", "--parallel.zero_stage", "3", "--text", "one", "--text", "two",
        "--tokenizer", "bytes",
    ],
}  # fmt: skip
"""Of these, those with texts, and `mean` and `pca`, are of two towers."""
FEW = ("integrated_gradients", "rise", "lens", "pca")  # on two ranks


@pytest.mark.slow
def test_files_of_many_ranks_are_those_of_one(places: Path, tmp_path: Path) -> None:
    jobs = {}
    for method, layout in LAYOUTS.items():
        model = "pair" if method in ("mean", "pca") or "--text" in layout else "model"
        alone = [word for i, word in enumerate(layout) if not f"{layout[i - i % 2]}".startswith("--parallel.")]
        assert run(places, tmp_path / "one", method, *alone, model=model) == 0
        argv = ["--checkpoint", str(places / model), "--images", str(places / "images"), "--method", method]
        ranks = 2 if method in FEW else 4
        jobs[method] = ("tools.visualize.__main__", ranks, [*argv, "--out", str(tmp_path / "many"), *layout])
    codes = run_jobs(tmp_path, jobs, timeout=300)
    assert codes == {method: [0] * (2 if method in FEW else 4) for method in LAYOUTS}, [
        (tmp_path / f"{m}.txt").read_text() for m in LAYOUTS
    ]
    one, many = ({path.name: path for path in (tmp_path / name).iterdir()} for name in ("one", "many"))
    assert one.keys() == many.keys()
    for name in (f"{method}.npz" for method in LAYOUTS if method != "page"):
        ours, theirs = np.load(one[name]), np.load(many[name])
        assert set(ours) == set(theirs)
        for key in set(ours) - {"images"}:
            assert np.allclose(ours[key], theirs[key], atol=1e-5), (name, key)
    assert abs(one["page.html"].stat().st_size - many["page.html"].stat().st_size) < 200
    assert (tmp_path / "page.txt").read_text().count("shades") == 1  # the first rank speaks
