"""Decoded images in a shared file: what comes out, that it is one copy, and when it is refused."""

import multiprocessing
import os
import platform
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.image_sets import log_messages, photograph, truncate, write_folder, write_tars
from torch.utils.data import DataLoader

import datasets
from arguments import build_parser
from benchmarks import cache as benchmark_cache
from datasets import build_loader, cache_splits
from readers import cache
from readers.cache import CachedImages, cache_images
from readers.folders import read_folder
from readers.images import ArrayImages, ImageFiles, SubsetOf, UnreadableImage
from samplers import EvalSampler
from tasks.classify import Classification
from utils import Processes, UserError

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path):
    """Photographs of different sizes, three classes of two."""
    root = write_folder(tmp_path / "photographs", ["ant", "bee", "cat"])
    for number, path in enumerate(sorted(root.glob("*/*/*"))):
        photograph(number).save(path)
    return root


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, empty, as TMPDIR names it."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return path


def run_args(data_path, **changed):
    """main.py's defaults but for what is given."""
    given = {"data_set": "folder", "data_path": data_path, "seed": 3, "input_size": 40, **changed}
    return Namespace(**{**vars(build_parser().parse_args([])), **given})


def build(args, split, processes=ALONE):
    """One split as a run has it when training begins."""
    dataset = Classification.data(args, split, processes)
    if args.cache_images:
        cache_splits([dataset], processes)
    return dataset


def batches(args, split="train", num_workers=0, processes=ALONE):
    """Every batch of an epoch: images, labels, replacements."""
    dataset = build(args, split, processes)
    sampler = EvalSampler(len(dataset), processes.rank, processes.world_size)
    return list(build_loader(dataset, sampler, 2, num_workers))


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(one[name], other[name]) for one, other in zip(ours, theirs, strict=True) for name in one
    )


def mapped_files():
    """Device and inode of the files with images that this process has mapped; none has a name."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "sar-images-" in line]
    assert all(line.endswith("(deleted)") for line in lines)
    return {tuple(line.split()[3:5]) for line in lines}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("data_set", "num_workers"), [("folder", 0), ("folder", 2), ("tar", 0)])
def test_batches_are_bit_identical_with_and_without_the_cache(folder, tmp_path, split, data_set, num_workers):
    place = folder if data_set == "folder" else write_tars(folder, tmp_path / "tars", "one")
    ours = batches(run_args(place, data_set=data_set, cache_images=True), split, num_workers)
    assert equal(ours, batches(run_args(folder), split))


def test_only_the_chosen_images_are_cached(folder):
    with log_messages() as messages:
        args = run_args(folder, sampling_ratio=0.5, cache_images=True)
        dataset = build(args, "train")
    assert isinstance(dataset.base, CachedImages)
    assert (len(dataset), dataset.base.targets.tolist()) == (3, [0, 1, 2])
    assert any(message.startswith("INFO: 3 decoded images take") for message in messages)
    assert equal(batches(args), batches(run_args(folder, sampling_ratio=0.5)))


def test_sets_that_are_in_memory_stay_as_they_are():
    args = run_args(None, data_set="digits", sampling_ratio=0.5, cache_images=True)
    assert isinstance(build(args, "train").base, SubsetOf)
    assert isinstance(build(args, "val").base, ArrayImages)


@pytest.mark.parametrize("keep", [0.0, 0.7])  # without a header; with one
def test_an_unreadable_image_is_replaced_and_counted_as_without_the_cache(folder, keep):
    truncate(folder / "val" / "bee" / "1.jpg", keep)
    ours = batches(run_args(folder, skip_unreadable=True, cache_images=True), "val", num_workers=2)
    assert equal(ours, batches(run_args(folder, skip_unreadable=True), "val"))
    assert torch.cat([batch["replaced"] for batch in ours]).tolist() == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("keep", [0.0, 0.7])
def test_without_skipping_the_run_stops_before_training_and_names_the_file(folder, keep):
    truncate(folder / "train" / "bee" / "1.jpg", keep)
    with pytest.raises(UnreadableImage, match=r"train/bee/1.jpg'.*--skip-unreadable") as error:
        build(run_args(folder, cache_images=True), "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_that_was_built_before_takes_the_cached_images(folder, num_workers):
    expected = batches(run_args(folder), "val")
    dataset = Classification.data(run_args(folder), "val", ALONE)
    loader = build_loader(dataset, EvalSampler(len(dataset), 0, 1), 2, num_workers)
    cache_splits([dataset], ALONE)
    for path in (folder / "val").glob("*/*"):
        path.write_bytes(b"")
    assert equal(list(loader), expected)


def test_a_set_that_is_read_twice_is_decoded_once(folder, monkeypatch):
    """As the training images of a self-supervised run, which are also the bank of its k-NN."""
    train, again, val = (Classification.data(run_args(folder), name, ALONE) for name in ("train", "train", "val"))
    decoded, original = [], datasets.cache_images
    monkeypatch.setattr(
        datasets, "cache_images", lambda bases, *more: decoded.append(len(bases)) or original(bases, *more)
    )
    cache_splits([train, again, val], ALONE)
    assert decoded == [2]
    assert train.base is again.base
    assert list(train.base.names) != list(val.base.names)


def in_worker(images, context):
    """What a loader worker has mapped, and the first image's bytes."""
    return next(iter(DataLoader(images, num_workers=1, multiprocessing_context=context, collate_fn=files_and_first)))


def files_and_first(items):
    return mapped_files(), items[0][0].numpy().tobytes()


def as_rank(rank, store, folder, results):
    """One of four processes on two machines, whose ranks alternate: share the cached images, and load."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    platform.node = lambda: f"machine {rank % 2}"
    processes = Processes(rank, 4, torch.device("cpu"), local_rank=rank // 2)
    with log_messages() as messages:
        dataset = build(run_args(folder, cache_images=True), "train", processes)
    ours = list(build_loader(dataset, EvalSampler(6, rank, 4), 2, num_workers=1))
    same = equal(ours, batches(run_args(folder), processes=processes))
    results.put((rank, len(messages), mapped_files(), in_worker(dataset.base, "fork")[0], same))
    dist.destroy_process_group()


def test_ranks_and_workers_of_a_machine_share_one_copy(folder, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=as_rank, args=(rank, tmp_path / "store", folder, results)) for rank in range(4)]
    for process in ranks:
        process.start()
    reports = sorted((results.get(timeout=120) for _ in ranks), key=lambda report: report[0])
    for process in ranks:
        process.join(timeout=60)
    _, messages, files, files_of_workers, same = zip(*reports, strict=True)
    assert messages == (1, 1, 0, 0), "local rank 0 decodes"
    assert [len(each) for each in files] == [1] * 4
    assert files[0] == files[2] != files[1] == files[3]
    assert files_of_workers == files
    assert same == (True,) * 4


def test_spawned_workers_map_the_same_copy_and_nothing_can_write_into_it(folder):
    (cached,) = cache_images([read_folder(folder, "val")], ALONE, False)
    image, _ = cached[0]
    before = image.numpy().tobytes()
    image[:, 0, 0] = torch.tensor([1, 2, 3])
    assert cached[0][0].numpy().tobytes() == before
    assert in_worker(cached, "spawn") == (mapped_files(), before)
    with pytest.raises(ValueError, match="read-only"):
        cached._bytes[-1] = 0


def test_the_file_has_no_name_when_decoding_begins_and_goes_with_the_set(folder, temporary, monkeypatch):
    found, before, read = [], mapped_files(), ImageFiles.__getitem__
    monkeypatch.setattr(ImageFiles, "__getitem__", lambda *which: found.append([*temporary.iterdir()]) or read(*which))
    (cached,) = cache_images([read_folder(folder, "val")], ALONE, False)
    assert found == [[]] * 6
    assert len(mapped_files() - before) == 1
    del cached
    assert mapped_files() == before


def test_no_file_is_left_when_another_process_is_lost(folder, temporary, monkeypatch):
    def lost(values, value):
        assert len([*temporary.iterdir()]) == 1
        raise RuntimeError("connection closed")

    monkeypatch.setattr(dist, "all_gather_object", lost)
    with pytest.raises(RuntimeError, match="connection closed"):
        cache_images([read_folder(folder, "val")], Processes(0, 2, torch.device("cpu")), False)
    assert [*temporary.iterdir()] == []


def test_both_splits_must_fit_before_any_image_is_decoded(folder, temporary, monkeypatch):
    splits = [Classification.data(run_args(folder), split, ALONE) for split in ("train", "val")]
    bases = [split.base for split in splits]
    needed = sum(3 * width * height for base in bases for width, height in map(base.size, range(6)))
    free = {str(temporary): Namespace(free=needed - 1)}
    monkeypatch.setattr(shutil, "disk_usage", free.get)
    monkeypatch.setattr(cache, "GIB", 1000)
    monkeypatch.setattr(ImageFiles, "__getitem__", None)
    with pytest.raises(UserError) as error:
        cache_splits(splits, ALONE)
    numbers = f"needs {needed / 1000:.1f} GiB for decoded images, and {temporary} has {(needed - 1) / 1000:.1f} GiB"
    mend = "set TMPDIR to a folder with more space, or leave the option out"
    assert str(error.value) == f"--cache-images {numbers}; {mend}"
    assert [split.base for split in splits] == bases


def test_the_cache_needs_linux(folder, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    with pytest.raises(UserError, match="--cache-images needs Linux"):
        cache_images([read_folder(folder, "train")], ALONE, False)


def test_the_benchmark_prints_a_table_of_both(folder, capsys):
    options = "--input-size 32 --batch-size 2 --num-workers 1 --repeats 1 --warmup 0"
    benchmark_cache.main(["--data-path", str(folder), *options.split()])
    out = capsys.readouterr().out.splitlines()
    assert "6 images at 32 px, --aa rand-m9-mstd0.5-inc1" in out
    assert [line.split(" | ")[0] for line in out[-2:]] == ["| files", "| memory"]
    assert out[-2].endswith(" 1.00 |")
