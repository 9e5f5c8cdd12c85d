"""Every reader on a small copy of the real layout and on broken ones; transforms, augmentation, loading."""

import contextlib
import hashlib
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from datasets import (
    CLASS_LISTS,
    DATASETS,
    MAX_REPLACEMENTS,
    UnreadableImage,
    build_dataset,
    build_loader,
    build_transform,
    canonical_name,
    isolated_rng,
    read_image,
)
from samplers import Draw, EvalSampler, TrainSampler, seed_sequence
from utils import UserError

IMAGENET100 = sorted(
    line for line in (CLASS_LISTS / "imagenet100.txt").read_text().splitlines() if line and not line.startswith("#")
)


def transform_args(**changed):
    defaults = {
        "input_size": 48,
        "color_jitter": 0.4,
        "aa": "rand-m9-mstd0.5-inc1",
        "train_interpolation": "bicubic",
        "reprob": 0.25,
        "remode": "pixel",
        "recount": 1,
        "crop_pct": None,
        "hflip": 0.5,
        "scale": (0.08, 1.0),
    }
    return SimpleNamespace(**{**defaults, **changed})


def picture(number=0, size=(40, 30), mode="RGB"):
    """A smooth random picture, another one for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


def write_folder(root, classes, per_class=2, splits=("train", "val"), suffix=".jpg"):
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(per_class):
                picture(10 * label + number).save(root / split / name / f"{number}{suffix}")
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "animals", ["ant", "bee", "cat"])


def truncate(path, keep=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "key"),
    [("digits", "digits"), ("IMNET", "imagenet"), ("CIFAR", "cifar100"), ("ImageNet100", "imagenet100")],
)
def test_names_in_any_case_and_deits_spellings(name, key):
    assert canonical_name(name) == key


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"'imagnet'.*did you mean imagenet"):
        canonical_name("imagnet")
    with pytest.raises(UserError, match=r"'xyz'.*digits, folder, imagenet"):
        build_dataset("xyz", "train")


def test_an_unknown_split_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="'test'"):
        build_dataset("digits", "test")


# --------------------------------------------------------------------------------------------- digits


def test_digits_are_sklearns_and_every_fifth_is_val():
    from sklearn.datasets import load_digits

    scans = load_digits()
    train, num_classes = build_dataset("digits", "train")
    val, _ = build_dataset("digits", "val")
    assert (len(train), len(val), num_classes) == (1437, 360, 10)
    for number, (dataset, index) in {0: (val, 0), 1: (train, 0), 4: (train, 3), 5: (val, 1)}.items():
        image, target, replaced = dataset[Draw(index, 0, 0)]
        assert (image.mode, image.size, target, replaced) == ("RGB", (8, 8), scans.target[number], 0)
        pixels = np.asarray(image)
        np.testing.assert_allclose(pixels[..., 0], scans.images[number] * 255 / 16, atol=0.5)
        assert (pixels == pixels[..., :1]).all()


def test_digits_bring_their_own_sizes():
    assert {"input_size", "patch_size", "epochs", "batch_size"} <= set(DATASETS["digits"].defaults)


# -------------------------------------------------------------------------------------------- folders


def test_a_folder_is_read_by_sorted_class_names(folder):
    dataset, num_classes = build_dataset("folder", "train", str(folder))
    assert (len(dataset), num_classes, dataset.classes) == (6, 3, ["ant", "bee", "cat"])
    image, target, replaced = dataset[Draw(4, 0, 0)]
    assert (image.size, image.mode, target, replaced) == ((40, 30), "RGB", 2, 0)


def test_a_home_folder_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(build_dataset("folder", "val", "~/animals")[0]) == 6


def test_val_alone_can_be_evaluated(folder):
    shutil.rmtree(folder / "train")
    assert build_dataset("folder", "val", folder)[1] == 3


def break_missing(root):
    shutil.rmtree(root)


def break_val(root):
    shutil.rmtree(root / "val")


def break_class(root):
    for path in (root / "val" / "bee").iterdir():
        path.rename(path.with_suffix(".txt"))


def break_same(root):
    (root / "val" / "bee").rename(root / "val" / "bear")


def break_more(root):
    shutil.copytree(root / "train" / "ant", root / "train" / "ape")


def break_flat(root):
    for path in list((root / "val").glob("*/*")):
        path.rename(root / "val" / f"{path.parent.name}_{path.name}")
    for path in list((root / "val").iterdir()):
        if path.is_dir():
            path.rmdir()


def break_empty(root):
    shutil.rmtree(root / "val")
    (root / "val").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_missing, r"--data-path .*animals: no such folder.*train/<class>"),
        (break_val, r"no folder val/; expected train/<class>/\* and val/<class>/\*"),
        (break_class, r"val: no images in the class folders bee;.*\.jpg"),
        (break_same, r"same class folders; only in val/: bear; only in train/: bee"),
        (break_more, r"same class folders; only in train/: ape"),
        (break_flat, r"val: images lie directly in it;.*extract_ILSVRC.sh"),
        (break_empty, r"val: no images"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        build_dataset("folder", "val", folder)
    assert "\n" not in str(error.value)


def test_classes_that_differ_stop_the_training_split_too(folder):
    break_same(folder)
    with pytest.raises(UserError, match="only in train/: bee"):
        build_dataset("folder", "train", folder)


def test_a_set_of_files_needs_a_path():
    with pytest.raises(UserError, match=r"imagenet needs --data-path, a folder with train/<class>"):
        build_dataset("IMNET", "train")


def test_imagenet_has_a_thousand_classes(folder, tmp_path):
    with pytest.raises(UserError, match=r"3 class folders instead of 1000.*--data-set folder"):
        build_dataset("imagenet", "val", folder)
    picture().save(tmp_path / "image.jpg")
    for split in ("train", "val"):
        for number in range(1000):
            (tmp_path / split / f"n{number:08}").mkdir(parents=True)
            os.link(tmp_path / "image.jpg", tmp_path / split / f"n{number:08}" / "0.JPEG")
    dataset, num_classes = build_dataset("imagenet", "train", tmp_path)
    assert (len(dataset), num_classes) == (1000, 1000)


def test_the_published_list_has_a_hundred_wnids():
    assert len(set(IMAGENET100)) == 100
    assert all(name[0] == "n" and name[1:].isdigit() and len(name) == 9 for name in IMAGENET100)


def test_imagenet100_is_filtered_from_imagenet_or_ready(tmp_path):
    ready = write_folder(tmp_path / "ready", IMAGENET100, per_class=1)
    whole = shutil.copytree(ready, tmp_path / "whole")
    write_folder(whole, ["n00000001", "n99999999"], per_class=1)
    for root in (ready, whole):
        dataset, num_classes = build_dataset("imagenet100", "val", root)
        assert (len(dataset), num_classes, dataset.classes) == (100, 100, IMAGENET100)
        assert [dataset[Draw(index, 0, 0)][1] for index in (0, 57, 99)] == [0, 57, 99]
    for name in IMAGENET100[10:17]:
        shutil.rmtree(ready / "train" / name)
    with pytest.raises(UserError, match=rf"no folders for the classes {IMAGENET100[10]}, .* and 2 more;"):
        build_dataset("imagenet100", "train", ready)


# --------------------------------------------------------------------------------------------- CIFAR


def write_cifar(monkeypatch, reader, root, files, label_key, meta):
    """Tiny batches in the published format, and their checksums in place of the published ones."""
    folder = root / reader.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)
    checksums = {}
    for name in files:
        data = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
        content = pickle.dumps({"data": data, label_key: [3, 1, 2, 0]})
        (folder / name).write_bytes(content)
        checksums[name] = hashlib.md5(content).hexdigest()
    content = pickle.dumps({meta["key"]: [f"class {label}" for label in range(meta["classes"])]})
    (folder / meta["filename"]).write_bytes(content)
    train = [[name, checksums[name]] for name in files[:-1]]
    monkeypatch.setattr(reader, "train_list", train)
    monkeypatch.setattr(reader, "test_list", [[files[-1], checksums[files[-1]]]])
    monkeypatch.setattr(reader, "meta", {**meta, "md5": hashlib.md5(content).hexdigest()})


def write_cifar10(monkeypatch, root):
    files = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    meta = {"filename": "batches.meta", "key": "label_names", "classes": 10}
    write_cifar(monkeypatch, CIFAR10, root, files, "labels", meta)


def test_cifar10_is_read_from_its_batches(monkeypatch, tmp_path):
    write_cifar10(monkeypatch, tmp_path)
    train, num_classes = build_dataset("cifar10", "train", tmp_path)
    val, _ = build_dataset("cifar10", "val", tmp_path)
    assert (len(train), len(val), num_classes) == (20, 4, 10)
    image, target, _ = train[Draw(5, 0, 0)]
    assert (image.size, image.mode, target) == ((32, 32), "RGB", 1)


def test_cifar100_takes_the_fine_labels(monkeypatch, tmp_path):
    meta = {"filename": "meta", "key": "fine_label_names", "classes": 100}
    write_cifar(monkeypatch, CIFAR100, tmp_path, ["train", "test"], "fine_labels", meta)
    val, num_classes = build_dataset("CIFAR", "val", tmp_path)
    assert (len(val), num_classes, val[Draw(2, 0, 0)][1]) == (4, 100, 2)


def test_missing_or_damaged_cifar_files_are_named(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"cifar-100-python: files missing or damaged; extract cifar-100-python.tar.gz"):
        build_dataset("cifar100", "train", tmp_path)
    write_cifar10(monkeypatch, tmp_path)
    truncate(tmp_path / "cifar-10-batches-py" / "data_batch_3")
    with pytest.raises(UserError, match=r"cifar-10-batches-py: files missing or damaged"):
        build_dataset("cifar10", "train", tmp_path)


# --------------------------------------------------------------------------------- unreadable images


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".ppm", ".tif", ".webp"])
@pytest.mark.parametrize("keep", [0, 0.3, 0.95])
def test_a_truncated_image_is_noticed_and_named(tmp_path, suffix, keep):
    path = tmp_path / f"broken{suffix}"
    picture(size=(200, 150)).save(path)
    assert read_image(path).size == (200, 150)
    truncate(path, keep)
    with pytest.raises(UnreadableImage, match=rf"broken\{suffix}.*--skip-unreadable") as error:
        read_image(path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_image_or_is_gone_is_named(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("text.jpg", "gone.jpg"):
        with pytest.raises(UnreadableImage, match=name):
            read_image(tmp_path / name)


def loading_error(loader):
    """The message that stops an epoch."""
    try:
        list(loader)
    except UnreadableImage as error:
        # the exception holds the loader in a cycle; collected as such, every worker takes 5 s to end
        traceback.clear_frames(error.__traceback__)
        return str(error)
    return "no error"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_stops_the_loader_with_one_line(folder, num_workers):
    truncate(folder / "train" / "bee" / "1.jpg")
    dataset, _ = build_dataset("folder", "train", folder, build_transform(False, transform_args()))
    message = loading_error(build_loader(dataset, EvalSampler(len(dataset)), 2, num_workers))
    assert message.startswith(f"cannot read the image '{folder / 'train' / 'bee' / '1.jpg'}'")
    assert message.endswith("or give --skip-unreadable")
    assert "\n" not in message


def test_a_strange_file_name_stays_on_one_line(folder):
    strange = folder / "train" / "bee" / "datasets.UnreadableImage: a\nb.jpg"
    strange.write_text("no image")
    dataset, _ = build_dataset("folder", "train", folder, build_transform(False, transform_args()))
    message = loading_error(build_loader(dataset, EvalSampler(len(dataset)), 2, num_workers=1))
    assert message.startswith("cannot read the image ")
    assert r"UnreadableImage: a\nb.jpg" in message


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skip_unreadable_replaces_the_image_and_counts_it(folder, num_workers):
    truncate(folder / "train" / "ant" / "1.jpg")  # index 1; index 2 is the first bee
    truncate(folder / "train" / "cat" / "1.jpg")  # index 5, the last: index 0 stands in
    transform = build_transform(False, transform_args())
    dataset, _ = build_dataset("folder", "train", folder, transform, skip_unreadable=True)
    batches = list(build_loader(dataset, EvalSampler(len(dataset)), 3, num_workers))
    images, targets, replaced = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert replaced.tolist() == [0, 1, 0, 0, 0, 1]
    assert targets.tolist() == [0, 1, 1, 1, 2, 0]
    assert torch.equal(images[1], images[2])
    assert torch.equal(images[5], images[0])


def test_too_many_unreadable_images_in_a_row_stop_the_run(tmp_path):
    root = write_folder(tmp_path, ["ant"], per_class=MAX_REPLACEMENTS + 2, splits=("train",))
    for path in sorted((root / "train" / "ant").iterdir())[: MAX_REPLACEMENTS + 1]:
        truncate(path)
    dataset, _ = build_dataset("folder", "train", root, skip_unreadable=True)
    assert dataset[Draw(1, 0, 0)][2] == 1
    with pytest.raises(UnreadableImage):
        dataset[Draw(0, 0, 0)]


# ---------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA"])
@pytest.mark.parametrize("size", [(90, 31), (20, 80)])
@pytest.mark.parametrize("input_size", [32, 48])
def test_any_kind_of_image_becomes_a_square_tensor(tmp_path, mode, size, input_size):
    path = tmp_path / {"CMYK": "image.jpg"}.get(mode, "image.png")
    picture(size=size, mode=mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB"
    for train in (True, False):
        tensor = build_transform(train, transform_args(input_size=input_size))(image)
        assert tensor.shape == (3, input_size, input_size)
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()


def normalised(image):
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.from_numpy((np.asarray(image) / 255 - mean) / std).permute(2, 0, 1).float()


def test_evaluation_resizes_256_to_224_and_crops_the_centre():
    image = picture(size=(512, 300))
    expected = normalised(image.resize((436, 256), Image.Resampling.BICUBIC).crop((106, 16, 330, 240)))
    result = build_transform(False, transform_args(input_size=224))(image)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_crop_pct_is_the_share_that_evaluation_keeps():
    image = picture(size=(64, 64))
    whole = build_transform(False, transform_args(input_size=64, crop_pct=1.0))(image)
    torch.testing.assert_close(whole, normalised(image), atol=1e-5, rtol=0)


def test_small_images_are_evaluated_whole():
    image = picture(size=(32, 32))
    result = build_transform(False, transform_args(input_size=32))(image)
    torch.testing.assert_close(result, normalised(image), atol=1e-5, rtol=0)


def bare(**changed):
    """Arguments that leave nothing of the training transform but the crop."""
    return transform_args(color_jitter=0.0, aa="none", reprob=0.0, hflip=0.0, **changed)


def test_small_images_are_shifted_by_up_to_four_pixels_in_training():
    image = picture(size=(32, 32))
    padded = torch.nn.functional.pad(normalised(image), (4, 4, 4, 4), value=torch.nan)
    transform = build_transform(True, bare(input_size=32))
    black = normalised(np.zeros((1, 1, 3)))
    shifts = set()
    for _ in range(40):
        result = transform(image)
        for top, left in np.ndindex(9, 9):
            window = padded[:, top : top + 32, left : left + 32]
            window = torch.where(window.isnan(), black, window)
            if torch.allclose(result, window, atol=1e-5):
                shifts.add((top, left))
                break
        else:
            pytest.fail("the result is no crop of the padded image")
    assert len(shifts) > 10


def difference_from_bare(**changed):
    """How many of 30 draws an option changes, with the same random crop."""
    image = picture(size=(60, 60))
    plain, other = (build_transform(True, args) for args in (bare(), SimpleNamespace(**{**vars(bare()), **changed})))
    different = 0
    for number in range(30):
        results = []
        for transform in (plain, other):
            with isolated_rng(seed_sequence("test", number)):
                results.append(transform(image))
        different += not torch.equal(*results)
    return different


@pytest.mark.parametrize(
    ("option", "least", "most"),
    [
        ({"hflip": 0.5}, 5, 25),
        ({"color_jitter": 0.4}, 29, 30),
        ({"aa": "rand-m9-mstd0.5-inc1"}, 20, 30),
        ({"reprob": 1.0}, 29, 30),
        ({"reprob": 1.0, "remode": "const", "recount": 3}, 29, 30),
        ({"train_interpolation": "bilinear"}, 29, 30),
        ({"scale": (0.9, 1.0)}, 29, 30),
        ({}, 0, 0),
    ],
)
def test_every_augmentation_option_reaches_the_images(option, least, most):
    assert least <= difference_from_bare(**option) <= most


@pytest.mark.parametrize("policy", ["foo", "rand-m9-qq1", "rand-n1.5"])
def test_an_unknown_policy_is_one_line(policy):
    with pytest.raises(UserError, match=rf"--aa {policy}.*rand-m9-mstd0.5-inc1"):
        build_transform(True, transform_args(aa=policy))


# ----------------------------------------------------------------------- randomness without a state


def rng_states():
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def same_states(first, second):
    return (
        first[0] == second[0]
        and all(np.array_equal(a, b) for a, b in zip(first[1], second[1], strict=True))
        and torch.equal(first[2], second[2])
    )


def draws_from_global_generators():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def test_isolated_rng_seeds_all_generators_and_restores_them():
    before = rng_states()
    with isolated_rng(seed_sequence("test", 1)):
        first = draws_from_global_generators()
    with isolated_rng(seed_sequence("test", 1)):
        second = draws_from_global_generators()
    with isolated_rng(seed_sequence("test", 2)):
        third = draws_from_global_generators()
    assert same_states(before, rng_states())
    assert first == second
    assert not set(first) & set(third)


def test_isolated_rng_restores_after_an_error():
    before = rng_states()
    with contextlib.suppress(KeyError), isolated_rng(seed_sequence("test", 1)):
        raise KeyError
    assert same_states(before, rng_states())


def training_batches(folder, num_workers, epoch=0, first_update=0, seed=3):
    dataset, _ = build_dataset("folder", "train", folder, build_transform(True, transform_args()), seed=seed)
    sampler = TrainSampler(len(dataset), batch_size=2, seed=7)
    sampler.set_epoch(epoch, first_update)
    return list(build_loader(dataset, sampler, 2, num_workers))


def test_any_number_of_workers_gives_the_same_images(folder):
    expected = training_batches(folder, 0)
    for num_workers in (1, 2):
        for ours, theirs in zip(training_batches(folder, num_workers), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_resumed_epoch_gives_the_images_that_were_left(folder):
    rest = training_batches(folder, 0, epoch=4, first_update=1)
    for ours, theirs in zip(rest, training_batches(folder, 2, epoch=4)[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_augmentation_changes_with_seed_epoch_and_position_and_with_nothing_else(folder):
    transform = build_transform(True, transform_args())

    def image(draw, seed=3):
        return build_dataset("folder", "train", folder, transform, seed=seed)[0][draw][0]

    first = image(Draw(0, 1, 2))
    random.seed(99)
    torch.default_generator.manual_seed(99)
    assert torch.equal(first, image(Draw(0, 1, 2)))
    others = [image(Draw(0, 1, 3)), image(Draw(0, 2, 2)), image(Draw(0, 1, 2), seed=4), image(Draw(1, 1, 2))]
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_generators_alone(folder, num_workers):
    before = rng_states()
    training_batches(folder, num_workers)
    assert same_states(before, rng_states())


# -------------------------------------------------------------------------------------------- loader


def test_one_loader_serves_many_epochs_with_the_same_workers(folder):
    dataset, _ = build_dataset("folder", "train", folder, build_transform(True, transform_args()), seed=3)
    sampler = TrainSampler(len(dataset), batch_size=2, seed=7)
    loader = build_loader(dataset, sampler, 2, num_workers=2)
    pids = set()
    for epoch in (0, 1):
        sampler.set_epoch(epoch, first_update=epoch)
        assert len(loader) == 3 - epoch
        images = torch.cat([batch[0] for batch in loader])
        expected = torch.cat([batch[0] for batch in training_batches(folder, 0, epoch, first_update=epoch)])
        assert torch.equal(images, expected)
        pids |= {worker.pid for worker in loader._iterator._workers}
    assert len(pids) == 2


def test_batches_are_tensors_of_images_labels_and_replacements():
    dataset, _ = build_dataset("digits", "val", transform=build_transform(False, transform_args(input_size=24)))
    images, targets, replaced = next(iter(build_loader(dataset, EvalSampler(len(dataset)), 5, num_workers=0)))
    assert images.shape == (5, 3, 24, 24)
    assert targets.tolist() == [0, 5, 0, 5, 0]
    assert (targets.dtype, replaced.tolist()) == (torch.int64, [0] * 5)


def load_while_signalled(results):
    """In a process group of its own: receive signals amid an epoch, and count the images that still come."""
    os.setsid()
    received = []
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for number in numbers:
        signal.signal(number, lambda number, frame: received.append(number))
    transform = build_transform(False, transform_args(input_size=24))
    dataset, _ = build_dataset("digits", "val", transform=transform)
    batches = iter(build_loader(dataset, EvalSampler(len(dataset)), 4, num_workers=2))
    images = len(next(batches)[0])
    for number in numbers:
        os.killpg(0, number)
    results.put((images + sum(len(batch[0]) for batch in batches), sorted(received)))


def test_a_signal_to_the_process_group_leaves_the_workers_working():
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=load_while_signalled, args=(results,))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0
    assert results.get() == (360, sorted([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]))
