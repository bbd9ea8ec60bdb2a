"""Linear probe and few-shot heads against scripts of their own: scikit-learn, SciPy, NumPy loops."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import optimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from tests.conftest import TINY, said
from tests.encoders import save_bert, save_resnet
from tests.probes.pictures import COLOURS, NUMBER, draw_classes, save_model
from train_clip import CLIPWrapper, cli, load
from train_clip.encoders import custom, sources
from train_clip.errors import UserError
from train_clip.models.clip import CLIP
from train_clip.models.config import config_from_dict
from train_clip.probes.features import Encoded, tapped
from train_clip.probes.heads import Head, Task, choose, fit_prolip, fit_tip_adapter, read_head
from train_clip.prompts.file import PromptConfig
from train_clip.prompts.model import add_prompts

TEXTS = [f"a photo of a {name}." for name in sorted(COLOURS)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    save_model(folder / "model.ckpt"), draw_classes(folder / "data")
    return folder


def run(place: Path, *words: object) -> dict:
    cli.main(
        ["probe", *map(str, (place / "model.ckpt", "--folder", place / "data", "--json", place / "p.json", *words))]
    )
    return json.loads((place / "p.json").read_text())


def by_hand(place: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int], list[str]]:
    """Features, embeddings, embeddings of the classes, labels and names, by the towers' own parts."""
    model, preprocess, tokenizer = load(place / "model.ckpt")
    names = sorted(path.relative_to(place / "data").as_posix() for path in (place / "data").rglob("*.png"))
    pixels = torch.stack([preprocess(str(place / "data" / name)) for name in names])
    with torch.no_grad():
        tower = model.visual
        features = tower.ln_post(tower.transformer(tower.embed(pixels))[:, 0])
        texts = torch.nn.functional.normalize(model.encode_text(tokenizer(TEXTS)))
        embeddings = features @ tower.proj
    labels = [sorted(COLOURS).index(name.split("/")[0].replace("_", " ")) for name in names]
    return *(one.double().numpy() for one in (features, embeddings, texts)), labels, names


def divided(labels: list[int], names: list[str], shots: int | None, seed: int, draw: int) -> tuple:
    """The rule in docs/evaluation.md, in loops."""
    rng, parts = np.random.default_rng((seed, draw)), ([], [], [])
    for label in range(3):
        own = [n for n in range(len(names)) if labels[n] == label]
        own.sort(key=lambda n: hashlib.sha256(names[n].encode()).hexdigest())
        tested, rest = own[:4], list(rng.permutation(own[4:]))
        first = shots or len(rest) - round(0.2 * len(rest))
        last = first + min(shots, 4) if shots else len(rest)
        for part, some in zip(parts, (rest[:first], rest[first:last], tested), strict=True):
            part.extend(int(one) for one in some)
    return parts


def linear_script(features, labels, train, val, test, joined: bool) -> tuple[float, float]:
    """The paper's search for λ with plain scikit-learn: top-1 on the test images, and λ."""
    labels, found = np.array(labels), {}

    def fitted(rows, place):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return LogisticRegression(C=1 / 10 ** (place / 8 - 6), max_iter=1000).fit(features[rows], labels[rows])

    best, places = None, [0, 16, 32, 48, 64, 80, 96]
    for step in (8, 4, 2, 1, None):
        for place in places:
            if 0 <= place <= 96:
                model = fitted(train, place)
                loss = -np.mean([model.predict_log_proba(features[[row]])[0, labels[row]] for row in val])
                found[place] = (model.score(features[val], labels[val]), -loss)
        best = max(found, key=found.get)
        places = [best - step, best + step] if step else []
    model = fitted(train + val if joined else train, best)
    return model.score(features[test], labels[test]), 10 ** (best / 8 - 6)


@pytest.mark.parametrize(("shots", "draws"), [(None, 1), (3, 4)])
def test_the_linear_probe_is_that_of_a_script_with_scikit_learn(place, shots, draws):
    """Features by the tower's parts, the split and the search for λ by loops: the same λ and the same top-1."""
    words = ["--shots", shots, "--draws", draws, "--seed", 5] if shots else []
    scores = run(place, *words)
    features, _, _, labels, names = by_hand(place)
    top1 = []
    for draw in range(draws):
        parts = divided(labels, names, shots, 5 if shots else 0, draw)
        accuracy, strength = linear_script(features, labels, *parts, joined=shots is None)
        assert scores["values"][draw]["linear"]["lambda"] == pytest.approx(strength)
        top1.append(accuracy)
    assert scores["heads"]["linear"]["by_draw"] == pytest.approx(top1)
    assert scores["heads"]["linear"]["top1"] == pytest.approx(np.mean(top1))
    assert scores["heads"]["linear"]["deviation"] == pytest.approx(np.std(top1, ddof=1) if draws > 1 else 0)
    assert [scores["images"][part] for part in ("training", "validation", "test")] == [len(one) for one in parts]


def test_the_few_shot_heads_are_their_formulas(place):
    """Tip-Adapter in loops over the cached images, and zero-shot: the same logits, the same top-1."""
    scores = run(place, "--shots", 4, "--draws", 1)
    features, embeddings, texts, labels, names = by_hand(place)
    train, _, test = divided(labels, names, 4, 0, 0)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    values = scores["values"][0]
    scale, alpha, beta = (values["tip-adapter"][name] for name in ("scale", "alpha", "beta"))
    zero_shot = scale * unit @ texts.T
    cached = zero_shot.copy()
    for row in range(len(unit)):
        for kept in train:
            cached[row, labels[kept]] += alpha * math.exp(-beta * (1 - unit[row] @ unit[kept]))

    rows = Encoded(torch.from_numpy(features), torch.from_numpy(embeddings))
    task = Task(rows.take(train), torch.tensor(labels)[train], torch.from_numpy(texts), scale)
    ours = fit_tip_adapter(task, {"alpha": alpha, "beta": beta})
    np.testing.assert_allclose(ours.logits(rows), cached, atol=1e-10)
    for kind, logits in (("zero-shot", zero_shot), ("tip-adapter", cached)):
        expected = np.mean([logits[n].argmax() == labels[n] for n in test])
        assert scores["heads"][kind]["top1"] == pytest.approx(expected), kind


@pytest.mark.parametrize("pull", [10, 1, 0.1])  # a weaker pull leaves several minima
def test_prolip_is_the_minimum_that_scipy_finds(pull):
    """Of the paper's objective, written out in NumPy with its gradient: the same loss, and the same logits."""
    rng = np.random.default_rng(0)
    features, embeddings, texts = rng.normal(size=(30, 6)), rng.normal(size=(30, 8)), rng.normal(size=(3, 8))
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    own = np.eye(3)[labels := rng.integers(0, 3, 30)]

    def tuned(change):
        z = embeddings + features @ change.reshape(6, 8)
        length = np.linalg.norm(z, axis=1, keepdims=True)
        return 5 * z / length @ texts.T, z, length

    def objective(change):
        logits, z, length = tuned(change)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        of_unit = 5 * (shares - own) @ texts / 30
        of_z = (of_unit - (of_unit * z).sum(axis=1, keepdims=True) * z / length**2) / length
        gradient = (features.T @ of_z).ravel() + 2 * pull * change
        return -np.log((shares * own).sum(axis=1)).mean() + pull * (change**2).sum(), gradient

    how = {"method": "L-BFGS-B", "jac": True, "options": {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10**4}}
    best = optimize.minimize(objective, np.zeros(48), **how).x
    images = Encoded(torch.from_numpy(features), torch.from_numpy(embeddings))
    ours = fit_prolip(Task(images, torch.from_numpy(labels), torch.from_numpy(texts), 5.0), {"lambda": pull})
    change = ours.tensors["change"].numpy().ravel()
    assert objective(change)[0] == pytest.approx(objective(best)[0])
    np.testing.assert_allclose(ours.logits(images), tuned(best)[0], atol=1e-3)


def test_of_equal_accuracies_the_lower_loss_is_chosen():
    """A separable task: every λ is right, the weights are not those of the strongest pull."""
    images = Encoded(torch.tensor([[-1.0], [1.0]]).repeat(8, 1), torch.eye(2).repeat(8, 1))
    labels = torch.tensor([0, 1]).repeat(8)
    task = Task(images, labels, torch.eye(2, dtype=torch.float64), 1.0)
    head = choose("linear", task, images, labels)
    assert head.values["lambda"] < 1e-5
    assert head.logits(images).softmax(dim=1).amax(dim=1).min() > 0.999


def clip(**image):
    return CLIP(config_from_dict(TINY | {"image": image} if image else TINY)).eval()


def test_features_are_what_the_projection_takes(tmp_path):
    """A ViT, a ResNet, visual prompts, two encoders of one width and of two: projected, they are the embeddings."""
    torch.manual_seed(0)
    resnet, vit, prompted = clip(size=32, blocks=[1, 1, 1, 1], width=8), clip(), clip()
    add_prompts(prompted, PromptConfig(number=2, layers=(0, 1), dropout=0.0, class_token=False))
    save_resnet(tmp_path / "resnet"), save_bert(tmp_path / "bert")
    image, text = sources.load_image_encoder(f"hf:{tmp_path}/resnet"), sources.load_text_encoder(f"hf:{tmp_path}/bert")
    two = custom.CustomCLIP(image, text, average=False, project=True, loss="softmax").eval()
    cases = {
        vit: lambda x: x @ vit.visual.proj,
        prompted.eval(): lambda x: x @ prompted.visual.backbone.proj,
        resnet: lambda x: resnet.visual.attnpool.c_proj(x),
        two: lambda x: two.image_projection(x),
    }
    for model, project in cases.items():
        pixels = torch.randint(256, (3, 3, model.image_size, model.image_size), dtype=torch.uint8)
        with torch.no_grad(), tapped(model) as taken:
            embeddings = model.encode_image(pixels)
        (features,) = taken
        assert features.shape[0] == 3 and features.ndim == 2
        torch.testing.assert_close(project(features), embeddings)
    vit.visual = torch.nn.Flatten()
    with pytest.raises(UserError, match="no projection that is known"), tapped(vit):
        pass


@pytest.mark.parametrize("kind", ["linear", "tip-adapter", "prolip"])
def test_a_head_is_saved_and_read(place, kind, tmp_path):
    """As plain safetensors: the logits are the same to the bit; another model and damaged files are refused."""
    path = tmp_path / "head.safetensors"
    scores = run(place, "--shots", 4, "--draws", 1, "--save", kind, "--output", path)
    model = load(place / "model.ckpt").model
    head, classes = read_head(path, model)
    assert classes == sorted(COLOURS) and head.values == scores["values"][0][kind]
    features, embeddings, _, labels, names = by_hand(place)
    images = Encoded(torch.from_numpy(features), torch.from_numpy(embeddings))
    test = divided(labels, names, 4, 0, 0)[2]
    hits = head.hits(images, torch.tensor(labels))[test]
    assert hits.mean().item() == pytest.approx(scores["heads"][kind]["top1"])
    other = CLIPWrapper.load_from_checkpoint(save_model(tmp_path / "other.ckpt", seed=1)).model
    with pytest.raises(UserError, match="of another model"):
        read_head(path, other)
    with pytest.raises(SystemExit) as stop:
        run(place, "--shots", 4, "--save", kind, "--output", path)
    assert "already exists" in said(stop)


def test_damaged_and_hostile_heads_are_refused(place, tmp_path):
    """Cut, without metadata, of an unknown kind, of other shapes, with labels out of range: each by one line."""
    path = tmp_path / "head.safetensors"
    run(place, "--shots", 2, "--draws", 1, "--save", "tip-adapter", "--output", path)
    model = load(place / "model.ckpt").model
    with safe_open(path, "pt") as file:
        ((key, about),) = file.metadata().items()
    tensors = load_file(path)
    told = json.loads(about)
    cases = {
        "kind": (tensors, told | {"kind": "pickle"}),
        "classes": (tensors, told | {"classes": ["a"]}),
        "values": (tensors, told | {"values": []}),
        "labels": (tensors | {"labels": tensors["labels"] + 100}, told),
        "keys": (tensors | {"keys": tensors["keys"][:, :3].contiguous()}, told),
        "nothing": ({}, told),
    }
    for some, text in cases.values():
        save_file(some, path, {key: json.dumps(text)})
        with pytest.raises(UserError, match="or damaged"):
            read_head(path, model)
    for content in (b"", b"x" * 100, (place / "model.ckpt").read_bytes()[:1000]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="or damaged"):
            read_head(path, model)


def test_too_few_images_of_a_class_are_named(place, tmp_path):
    """More shots than there are, one class, and no class."""
    for words, message in (
        (["--shots", "17"], f"blue: {NUMBER} images, 4 of them to test on. Expected at least 18 more"),
        (["--shots", "0"], "shots is 0; expected 1 or above"),
        (["--save", "prolip"], "Expected --shots with it"),
        (["--draws", "2"], "Expected --shots with it"),
        (["--output", "head.safetensors"], "Expected --save with it"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(place, *words)
        assert message in said(stop)
    with pytest.raises(SystemExit) as stop:
        cli.main(["probe", str(place / "model.ckpt"), "--folder", str(place / "data" / "green")])
    assert "all images are of the class 'green'" in said(stop)


def test_what_it_needs_is_looked_for_before_anything_is_embedded(place, tmp_path, monkeypatch):
    """scikit-learn, and places for the files."""
    monkeypatch.setattr("train_clip.probes.probe.encode", lambda *_: pytest.fail("embedded"))
    for words in (["--json", tmp_path], ["--save", "linear", "--output", place / "model.ckpt" / "head"]):
        with pytest.raises(SystemExit) as stop:
            run(place, *words)
        assert str(words[-1].parent if "--save" in words else words[-1]) in said(stop)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(SystemExit) as stop:
        run(place)
    assert "A linear probe needs scikit-learn" in said(stop)


def test_classes_come_from_cls_files_and_bad_images_are_left_out(place, tmp_path):
    """Numbers in STEM.cls by --classes, as in `evaluate`; an image that cannot be read is counted and named."""
    data = draw_classes(tmp_path / "data")
    for path in sorted(data.rglob("*.png")):
        path.with_suffix(".cls").write_text(str(sorted(COLOURS).index(path.parent.name.replace("_", " "))))
        path.rename(data / path.name), path.with_suffix(".cls").rename(data / f"{path.stem}.cls")
    (tmp_path / "classes.txt").write_text("\n".join(sorted(COLOURS)))
    (data / "b00.png").write_bytes(b"no picture")
    cli.main(
        ["probe", str(place / "model.ckpt"), "--folder", str(data), "--classes", str(tmp_path / "classes.txt"),
         "--json", str(tmp_path / "p.json"), "--shots", "2", "--draws", "1"]
    )  # fmt: skip
    scores = json.loads((tmp_path / "p.json").read_text())
    assert scores["images"]["unreadable"] == 1 and scores["skips"][0][0] == str(data / "b00.png")
    assert set(scores["heads"]) == {"zero-shot", "linear", "tip-adapter", "prolip"}


def test_a_head_of_two_classes_has_two_columns():
    """Scikit-learn's one column becomes the logits of both: its own probabilities."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(30, 4)), rng.integers(0, 2, 30)
    task = Task(Encoded(torch.from_numpy(features), torch.zeros(30, 2)), torch.from_numpy(labels), torch.eye(2), 1.0)
    head: Head = choose("linear", task, task.images, task.labels)
    model = LogisticRegression(C=1 / head.values["lambda"], max_iter=1000).fit(features, labels)
    np.testing.assert_allclose(head.logits(task.images).softmax(dim=1), model.predict_proba(features), atol=1e-12)
