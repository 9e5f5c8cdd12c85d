"""Data sets by name, what a run makes of them, transforms, augmentation, loading."""

import contextlib
import dataclasses
import http.server
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.image_sets import (
    log_messages,
    md5,
    truncate,
    write_cars,
    write_cifar10,
    write_domainnet,
    write_flowers,
    write_folder,
    write_pets,
)
from PIL import Image
from torch.utils.data import default_collate
from torchvision.datasets import CIFAR10, Flowers102, OxfordIIITPet

from augmentation import TrainTransform, as_tensor, eval_transform
from datasets import (
    DATASETS,
    MAX_REPLACEMENTS,
    SplitSettings,
    build_loader,
    build_split,
    canonical_name,
    collate,
    download,
    save_subset,
)
from randomness import isolated_rng
from readers.images import UnreadableImage
from samplers import Draw, EvalSampler, TrainSampler
from utils import Processes, UserError

ALONE = Processes(0, 1, torch.device("cpu"))


def split_of(name, path, split="train", processes=ALONE, transform=None, **settings):
    """One split of a data set as a run reads it."""
    return build_split(SplitSettings(name, path, **settings), split, transform, processes)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "animals", ["ant", "bee", "cat"])


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
    with pytest.raises(UserError, match=r"'xyz'.*digits, folder, images, tar, imagenet"):
        split_of("xyz", None)


def test_an_unknown_split_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="'test'"):
        split_of("digits", None, split="test")


def test_digits_bring_their_own_sizes():
    assert {"input_size", "epochs", "batch_size"} <= set(DATASETS["digits"].defaults)


# ----------------------------------------------------------------------------------- published numbers


@pytest.mark.parametrize(
    ("name", "train", "val", "classes", "folder"),
    [
        ("imagenet", 1_281_167, 50_000, 1000, "imagenet"),
        ("imagenet100", 126_689, 5_000, 100, "imagenet"),
        ("cars", 8_144, 8_041, 196, ""),
        ("clipart", 34_019, 14_818, 345, "domainnet"),
        ("painting", 52_867, 22_892, 345, "domainnet"),
        ("sketch", 49_115, 21_271, 345, "domainnet"),
        ("flowers", 2_040, 6_149, 102, ""),
        ("pets", 3_680, 3_669, 37, ""),
        ("cifar10", 50_000, 10_000, 10, ""),
        ("cifar100", 50_000, 10_000, 100, ""),
    ],
)
def test_the_published_numbers_are_known(name, train, val, classes, folder):
    entry = DATASETS[name]
    assert (entry.images, entry.num_classes, entry.folder) == ({"train": train, "val": val}, classes, folder)
    assert entry.layout


def test_the_cleaned_lists_are_smaller():
    cleaned = {name: entry.cleaned_images for name, entry in DATASETS.items() if entry.cleaned_images}
    assert cleaned == {
        "clipart": {"train": 33_525, "val": 14_604},
        "painting": {"train": 50_416, "val": 21_850},
        "sketch": {"train": 48_212, "val": 20_916},
    }


def test_a_number_of_images_that_is_not_the_papers_is_said_with_the_layout(tmp_path):
    root = write_cars(tmp_path)
    with log_messages() as messages:
        split_of("cars", root)
        split_of("cars", root, "val", Processes(1, 2, torch.device("cpu")))
    (message,) = messages
    assert message.startswith("WARNING: cars train: 197 images instead of 8,144; expected stanford_cars/ with")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("images", "cleaned", "message"),
    [
        (690, 600, "INFO: clipart train: 690 images of the original list, as in the paper"),
        (700, 690, "WARNING: clipart train: 690 images of the cleaned list; the paper uses the original list with 700"),
        (700, 600, "WARNING: clipart train: 690 images instead of 700; expected clipart_train.txt"),
    ],
)
def test_the_list_in_use_is_named(tmp_path, monkeypatch, images, cleaned, message):
    counts = {"images": {"train": images}, "cleaned_images": {"train": cleaned}}
    monkeypatch.setitem(DATASETS, "clipart", dataclasses.replace(DATASETS["clipart"], **counts))
    with log_messages() as messages:
        split_of("clipart", write_domainnet(tmp_path))
    assert len(messages) == 1
    assert messages[0].startswith(message)


def test_nothing_is_said_of_numbers_that_are_right_or_unknown(folder):
    with log_messages() as messages:
        for split in ("train", "val"):
            split_of("folder", folder, split=split)
            split_of("digits", None, split=split)
    assert messages == []


# ------------------------------------------------------------------------------------------ download


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder and the URL under which it is served."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def archive(folder, path, root):
    """A .tar.gz of ``folder``, whose names begin below ``root``; its checksum."""
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.relative_to(root))
    return md5(path)


def publish_cifar10(monkeypatch, site, url, original):
    write_cifar10(monkeypatch, original)
    checksum = archive(original / CIFAR10.base_folder, site / "cifar-10-python.tar.gz", original)
    monkeypatch.setattr(CIFAR10, "url", f"{url}/cifar-10-python.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", checksum)


def publish_flowers(monkeypatch, site, url, original):
    write_flowers(monkeypatch, original)
    folder = original / "flowers-102"
    checksum = archive(folder / "jpg", site / "102flowers.tgz", folder)
    for name in ("imagelabels.mat", "setid.mat"):
        shutil.copy(folder / name, site)
    monkeypatch.setattr(Flowers102, "_download_url_prefix", f"{url}/")
    monkeypatch.setattr(Flowers102, "_file_dict", Flowers102._file_dict | {"image": ("102flowers.tgz", checksum)})


def publish_pets(monkeypatch, site, url, original):
    folder = write_pets(original) / "oxford-iiit-pet"
    resources = [
        (f"{url}/{name}.tar.gz", archive(folder / name, site / f"{name}.tar.gz", folder))
        for name in ("images", "annotations")
    ]
    monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", resources)


PUBLISHED = {"cifar10": publish_cifar10, "flowers": publish_flowers, "pets": publish_pets}


@pytest.mark.parametrize("name", PUBLISHED)
def test_download_fetches_a_set_once(name, site, tmp_path, monkeypatch):
    original, target = tmp_path / "original", tmp_path / "new" / "data"
    original.mkdir()
    PUBLISHED[name](monkeypatch, *site, original)
    train, expected = split_of(name, target, download=True), split_of(name, original)
    assert len(train.classes) == DATASETS[name].num_classes
    assert [target for _, target in train.base] == [target for _, target in expected.base]
    assert torch.equal(train.base[1][0], expected.base[1][0])
    shutil.rmtree(site[0])  # what is there is not fetched again
    split_of(name, target, "val", download=True)


def test_a_download_that_fails_is_one_line(site, tmp_path, monkeypatch):
    original = tmp_path / "original"
    original.mkdir()
    publish_cifar10(monkeypatch, *site, original)
    truncate(site[0] / "cifar-10-python.tar.gz")
    with pytest.raises(UserError, match=r"--download cifar10 to .*corrupted.*copy cifar-10-batches-py/ there") as error:
        split_of("cifar10", tmp_path / "data", download=True)
    assert "\n" not in str(error.value)
    (site[0] / "cifar-10-python.tar.gz").unlink()
    with pytest.raises(UserError, match=r"--download cifar10 to .*HTTP Error 404"):
        split_of("cifar10", tmp_path / "data", download=True)


def break_checksum(site):
    truncate(site / "imagelabels.mat")


def break_server(site):
    shutil.rmtree(site)


@pytest.mark.parametrize(
    ("existing", "damage", "left"),
    [
        ("", break_server, []),
        ("new", break_server, ["new"]),
        ("new/data/flowers-102", break_server, ["new", "new/data", "new/data/flowers-102"]),
        ("", break_checksum, ["new", "new/data", "new/data/flowers-102", "new/data/flowers-102/jpg"]),
    ],
)
def test_a_download_that_fails_leaves_no_empty_folder(site, tmp_path, monkeypatch, existing, damage, left):
    root, original = tmp_path / "root", tmp_path / "original"
    original.mkdir()
    (root / existing).mkdir(parents=True)
    publish_flowers(monkeypatch, *site, original)
    damage(site[0])
    with pytest.raises(UserError, match="--download flowers to"):
        download("flowers", root / "new" / "data", ALONE)
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_dir()) == left


@pytest.mark.parametrize("name", ["folder", "tar"])
def test_own_images_are_nothing_to_fetch(name, tmp_path):
    with pytest.raises(UserError, match=f"--download: {name} is your own images.*nothing can be downloaded; remove"):
        download(name, tmp_path, ALONE)


@pytest.mark.parametrize(
    ("name", "source"),
    [("cars", "github.com/pytorch/vision/issues/7545"), ("clipart", "ai.bu.edu"), ("imagenet", "image-net.org")],
)
def test_a_set_that_cannot_be_fetched_says_where_it_is(name, source, tmp_path):
    with pytest.raises(
        UserError, match=f"--download: {name} cannot be downloaded automatically; get it from .*{source}"
    ):
        split_of(name, tmp_path, download=True)


def test_a_download_needs_a_place():
    with pytest.raises(UserError, match="--download needs --data-path"):
        split_of("pets", None, download=True)


def test_every_set_can_be_fetched_or_has_a_source():
    published = {name: entry for name, entry in DATASETS.items() if "your own" not in entry.about}
    assert set(DATASETS) - set(published) == {"folder", "images", "tar"}
    assert all(bool(entry.download) != bool(entry.source) for entry in published.values())


@pytest.mark.parametrize(
    ("rank", "local_rank", "turns"),
    [(0, 0, ["fetch", "wait", "fetch", "wait"]), (1, 1, ["wait", "wait"]), (8, 0, ["wait", "fetch", "wait"])],
)
def test_one_process_a_machine_downloads_and_the_others_wait(rank, local_rank, turns, tmp_path, monkeypatch):
    done = []
    entry = dataclasses.replace(DATASETS["pets"], download=lambda path: done.append("fetch"))
    monkeypatch.setitem(DATASETS, "pets", entry)
    monkeypatch.setattr("torch.distributed.barrier", lambda: done.append("wait"))
    download("pets", tmp_path, Processes(rank, 16, torch.device("cpu"), local_rank))
    assert done == turns


# ------------------------------------------------------------------------------------------- subsets


def test_the_training_split_alone_is_sampled(folder):
    with log_messages() as messages:
        train, val = (split_of("folder", folder, split, sampling_ratio=0.5) for split in ("train", "val"))
    assert messages == ["INFO: --sampling-ratio 0.5: 3 of 6 training images"]
    assert (len(train), train.base.targets.tolist(), len(train.classes), len(val)) == (3, [0, 1, 2], 3, 6)
    assert len(split_of("folder", folder)) == 6


def chosen(**changed):
    return list(split_of("digits", None, sampling_ratio=0.25, **changed).base.names)


def test_the_choice_depends_on_its_own_seed_alone():
    assert chosen() == chosen(seed=5)
    assert len(set(chosen()) & set(chosen(sampling_seed=1))) < 0.5 * len(chosen())


def test_the_choice_is_saved_by_name(folder, tmp_path):
    train = split_of("folder", folder, sampling_ratio=0.5, sampling_seed=3)
    save_subset(train, 0.5, 3, tmp_path / "subset.json")
    saved = json.loads((tmp_path / "subset.json").read_text())
    assert (saved["sampling_ratio"], saved["sampling_seed"]) == (0.5, 3)
    assert [name[:10] for name in saved["images"]] == ["train/ant/", "train/bee/", "train/cat/"]
    for name, (image, _) in zip(saved["images"], train.base, strict=True):
        assert torch.equal(image, as_tensor(Image.open(folder / name)))


def test_no_choice_leaves_no_file(folder, tmp_path):
    save_subset(split_of("folder", folder), 1.0, 0, tmp_path / "subset.json")
    assert not (tmp_path / "subset.json").exists()


# --------------------------------------------------------------------------------- unreadable images


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
    dataset = split_of("folder", folder, transform=eval_transform(48))
    message = loading_error(build_loader(dataset, EvalSampler(len(dataset)), 2, num_workers))
    assert message.startswith(f"cannot read the image '{folder / 'train' / 'bee' / '1.jpg'}'")
    assert ", or give --skip-unreadable; python -m analysis.check lists all" in message
    assert "\n" not in message


def test_a_strange_file_name_stays_on_one_line(folder):
    strange = folder / "train" / "bee" / "readers.UnreadableImage: a\nb.jpg"
    strange.write_text("no image")
    dataset = split_of("folder", folder, transform=eval_transform(48))
    message = loading_error(build_loader(dataset, EvalSampler(len(dataset)), 2, num_workers=1))
    assert message.startswith("cannot read the image ")
    assert r"UnreadableImage: a\nb.jpg" in message


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skip_unreadable_replaces_the_image_and_counts_it(folder, num_workers):
    truncate(folder / "train" / "ant" / "1.jpg")  # index 1; index 2 is the first bee
    truncate(folder / "train" / "cat" / "1.jpg")  # index 5, the last: index 0 stands in
    dataset = split_of("folder", folder, transform=eval_transform(48), skip_unreadable=True)
    batches = list(build_loader(dataset, EvalSampler(len(dataset)), 3, num_workers))
    images, targets, replaced = (
        torch.cat([batch[name] for batch in batches]) for name in ("images", "targets", "replaced")
    )
    assert replaced.tolist() == [0, 1, 0, 0, 0, 1]
    assert targets.tolist() == [0, 1, 1, 1, 2, 0]
    assert torch.equal(images[1], images[2])
    assert torch.equal(images[5], images[0])


def test_too_many_unreadable_images_in_a_row_stop_the_run(tmp_path):
    root = write_folder(tmp_path, ["ant"], per_class=MAX_REPLACEMENTS + 2, splits=("train",))
    for path in sorted((root / "train" / "ant").iterdir())[: MAX_REPLACEMENTS + 1]:
        truncate(path)
    dataset = split_of("folder", root, skip_unreadable=True)
    assert dataset[Draw(1, 0, 0)]["replaced"] == 1
    with pytest.raises(UnreadableImage, match=r"more than --skip-unreadable replaces: is the disk there\?") as error:
        dataset[Draw(0, 0, 0)]
    assert "or give --skip-unreadable" not in str(error.value), "it is given"


def test_a_folder_full_of_unreadable_images_is_passed(tmp_path):
    """More in a row than :data:`MAX_REPLACEMENTS`, as a failed download leaves them."""
    root = write_folder(tmp_path, ["ant", "bee"], per_class=MAX_REPLACEMENTS + 20, splits=("train",))
    for path in (root / "train" / "ant").iterdir():
        path.write_bytes(b"")
    dataset = split_of("folder", root, skip_unreadable=True)
    item = dataset[Draw(0, 0, 0)]
    assert (item["replaced"], item["targets"]) == (1, 1)


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
    with isolated_rng("test", 1):
        first = draws_from_global_generators()
    with isolated_rng("test", 1):
        second = draws_from_global_generators()
    with isolated_rng("test", 2):
        third = draws_from_global_generators()
    assert same_states(before, rng_states())
    assert first == second
    assert not set(first) & set(third)


def test_isolated_rng_restores_after_an_error():
    before = rng_states()
    with contextlib.suppress(KeyError), isolated_rng("test", 1):
        raise KeyError
    assert same_states(before, rng_states())


def training_batches(folder, num_workers, epoch=0, first_update=0, seed=3):
    dataset = split_of("folder", folder, transform=TrainTransform(48), seed=seed)
    sampler = TrainSampler(len(dataset), batch_size=2, seed=7)
    sampler.set_epoch(epoch, first_update)
    return list(build_loader(dataset, sampler, 2, num_workers))


def test_any_number_of_workers_gives_the_same_images(folder):
    expected = training_batches(folder, 0)
    for num_workers in (1, 2):
        for ours, theirs in zip(training_batches(folder, num_workers), expected, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def test_a_resumed_epoch_gives_the_images_that_were_left(folder):
    rest = training_batches(folder, 0, epoch=4, first_update=1)
    for ours, theirs in zip(rest, training_batches(folder, 2, epoch=4)[1:], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def test_augmentation_changes_with_seed_epoch_and_position_and_with_nothing_else(folder):
    transform = TrainTransform(48)

    def image(draw, seed=3):
        return split_of("folder", folder, transform=transform, seed=seed)[draw]["images"]

    first = image(Draw(0, 1, 2))
    random.seed(99)
    torch.default_generator.manual_seed(99)
    assert torch.equal(first, image(Draw(0, 1, 2)))
    others = [image(Draw(0, 1, 3)), image(Draw(0, 2, 2)), image(Draw(0, 1, 2), seed=4), image(Draw(1, 1, 2))]
    assert not any(torch.equal(first, other) for other in others)


def test_pairs_of_places_are_drawn_with_the_image_in_training_alone(folder):
    train, val = (split_of("folder", folder, split, seed=3, pairs=5) for split in ("train", "val"))
    first = train[Draw(0, 1, 2)]["pairs"]
    assert (first.shape, first.dtype) == ((5, 2, 2), np.float32)
    assert ((first >= 0) & (first < 1)).all()
    assert np.array_equal(first, train[Draw(4, 1, 2)]["pairs"]), "whatever image stands there"
    others = [train[Draw(0, 1, 3)], train[Draw(0, 2, 2)], split_of("folder", folder, seed=4, pairs=5)[Draw(0, 1, 2)]]
    assert not any(np.array_equal(first, other["pairs"]) for other in others)
    assert "pairs" not in val[Draw(0, 1, 2)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_generators_alone(folder, num_workers):
    before = rng_states()
    training_batches(folder, num_workers)
    assert same_states(before, rng_states())


# -------------------------------------------------------------------------------------------- loader


def test_one_loader_serves_many_epochs_with_the_same_workers(folder):
    dataset = split_of("folder", folder, transform=TrainTransform(48), seed=3)
    sampler = TrainSampler(len(dataset), batch_size=2, seed=7)
    loader = build_loader(dataset, sampler, 2, num_workers=2)
    pids = set()
    for epoch in (0, 1):
        sampler.set_epoch(epoch, first_update=epoch)
        assert len(loader) == 3 - epoch
        images = torch.cat([batch["images"] for batch in loader])
        expected = torch.cat([batch["images"] for batch in training_batches(folder, 0, epoch, first_update=epoch)])
        assert torch.equal(images, expected)
        pids |= {worker.pid for worker in loader._iterator._workers}
    assert len(pids) == 2


def test_batches_are_tensors_of_images_labels_and_replacements():
    dataset = split_of("digits", None, "val", transform=eval_transform(24))
    batch = next(iter(build_loader(dataset, EvalSampler(len(dataset)), 5, num_workers=0)))
    assert batch.keys() == {"images", "targets", "replaced"}
    assert batch["images"].shape == (5, 3, 24, 24)
    assert batch["targets"].tolist() == [0, 5, 0, 5, 0]
    assert (batch["targets"].dtype, batch["replaced"].tolist()) == (torch.int64, [0] * 5)


def test_a_batch_of_decoded_images_is_torchs_in_another_layout():
    pixels = [torch.randint(256, (4, 5, 3), dtype=torch.uint8) for _ in range(3)]
    items = [{"images": each.permute(2, 0, 1), "targets": 7, "pairs": np.ones((2, 2), np.float32)} for each in pixels]
    ours, theirs = collate(items), default_collate(items)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())
    assert ours["images"].is_contiguous(memory_format=torch.channels_last)


def load_while_signalled(results):
    """In a process group of its own: receive signals amid an epoch, and count the images that still come."""
    os.setsid()
    received = []
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    for number in numbers:
        signal.signal(number, lambda number, frame: received.append(number))
    dataset = split_of("digits", None, "val", transform=eval_transform(24))
    batches = iter(build_loader(dataset, EvalSampler(len(dataset)), 4, num_workers=2))
    images = sum(len(next(batches)["images"]) for _ in range(2))  # one from each worker: both have begun
    for number in numbers:
        os.killpg(0, number)
    for worker in batches._workers:  # as Slurm does, which finds them in any process group
        os.kill(worker.pid, signal.SIGTERM)
    results.put((images + sum(len(batch["images"]) for batch in batches), sorted(received)))


def test_a_signal_to_the_process_group_leaves_the_workers_working():
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=load_while_signalled, args=(results,))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0
    assert results.get() == (360, sorted([signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]))


AN_ERROR_BESIDE_WORKERS = """
import torch
from datasets import build_loader

loader = build_loader(torch.arange(100), range(100), 2, num_workers=2)
batches = iter(loader)
next(batches)
raise RuntimeError("an error that nobody foresaw")
"""


def test_an_error_ends_the_process_and_its_workers_at_once():
    """The interpreter would wait for ever for workers that ignore its SIGTERM."""
    command = [sys.executable, "-c", AN_ERROR_BESIDE_WORKERS]
    ended = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.endswith("RuntimeError: an error that nobody foresaw\n")
