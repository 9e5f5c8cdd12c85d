"""Decoded images in shared memory: what comes out, that it is one copy, and when it is refused."""

import multiprocessing
import os
import pickle
import signal
import socket
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from image_sets import log_messages, photograph, truncate, write_folder, write_tars
from torch.utils.data import DataLoader

from arguments import build_parser
from datasets import build_loader, cache_splits
from readers import cache
from readers.cache import CachedImages, available_memory, cache_images
from readers.folders import read_folder
from readers.images import ArrayImages, SubsetOf, UnreadableImage
from samplers import EvalSampler, TrainSampler
from tasks.classify import Classification
from utils import Processes, UserError

ALONE = Processes(0, 1, torch.device("cpu"))


def run_args(data_path, **changed):
    """main.py's defaults but for what is given."""
    defaults = vars(build_parser().parse_args([]))
    return Namespace(
        **{**defaults, "data_set": "folder", "data_path": data_path, "seed": 3, "input_size": 40, **changed}
    )


@pytest.fixture
def folder(tmp_path):
    """Photographs of different sizes, three classes of two."""
    root = write_folder(tmp_path / "photographs", ["ant", "bee", "cat"])
    for number, path in enumerate(sorted(root.glob("*/*/*"))):
        photograph(number).save(path)
    return root


def build(args, split, processes=ALONE):
    """One split as a run has it when training begins."""
    dataset = Classification.data(args, split, processes)
    if args.cache_images:
        cache_splits([dataset], processes)
    return dataset


def batches(args, processes=ALONE, split="train", num_workers=0):
    """Every batch of an epoch: images, labels, replacements."""
    dataset = build(args, split, processes)
    if split == "train":
        sampler = TrainSampler(len(dataset), 1, rank=processes.rank, world_size=processes.world_size)
    else:
        sampler = EvalSampler(len(dataset), processes.rank, processes.world_size)
    return list(build_loader(dataset, sampler, 2, num_workers))


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(one[name], other[name]) for one, other in zip(ours, theirs, strict=True) for name in one
    )


# ------------------------------------------------------------------------------------ the same images


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_bit_identical_with_and_without_the_cache(folder, split, num_workers):
    expected = batches(run_args(folder), split=split)
    assert equal(batches(run_args(folder, cache_images=True), ALONE, split, num_workers), expected)


def test_images_in_memory_need_no_file(folder):
    dataset = build(run_args(folder, cache_images=True), "val")
    expected = [image.tobytes() for image, _ in read_folder(folder, "val")]
    for path in (folder / "val").glob("*/*"):
        path.write_bytes(b"")
    assert [image.tobytes() for image, _ in dataset.base] == expected
    assert [image.mode for image, _ in dataset.base] == ["RGB"] * 6


def test_tars_are_cached_as_folders_are(folder, tmp_path):
    tars = write_tars(folder, tmp_path / "tars", "one")
    expected = batches(run_args(folder))
    assert equal(batches(run_args(tars, data_set="tar", cache_images=True)), expected)


def test_only_the_chosen_images_are_cached(folder):
    with log_messages() as messages:
        args = run_args(folder, sampling_ratio=0.5, cache_images=True)
        dataset = build(args, "train")
    assert isinstance(dataset.base, CachedImages)
    assert (len(dataset), dataset.base.targets) == (3, [0, 1, 2])
    assert any(message.startswith("INFO: 3 decoded images take") for message in messages)
    assert equal(batches(args), batches(run_args(folder, sampling_ratio=0.5)))


def test_sets_that_are_in_memory_stay_as_they_are(folder):
    args = run_args(None, data_set="digits", sampling_ratio=0.5, cache_images=True)
    assert isinstance(build(args, "train").base, SubsetOf)
    assert isinstance(build(args, "val").base, ArrayImages)
    cached = build(run_args(folder, cache_images=True), "val")
    base = cached.base
    cache_splits([cached], ALONE)  # once is enough
    assert cached.base is base


def test_building_a_split_decodes_nothing(folder):
    """So that a command line that is refused costs no decoding."""
    (folder / "train" / "bee" / "1.jpg").write_bytes(b"")
    dataset = Classification.data(run_args(folder, cache_images=True), "train", ALONE)
    assert not isinstance(dataset.base, CachedImages)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_that_was_built_before_takes_the_cached_images(folder, num_workers):
    expected = batches(run_args(folder), split="val")
    dataset = Classification.data(run_args(folder), "val", ALONE)
    loader = build_loader(dataset, EvalSampler(len(dataset), 0, 1), 2, num_workers)
    cache_splits([dataset], ALONE)
    for path in (folder / "val").glob("*/*"):
        path.write_bytes(b"")
    assert equal(list(loader), expected)


def test_decoding_leaves_the_global_generator_alone(folder):
    before = torch.get_rng_state()
    cache_images([read_folder(folder, "val")], ALONE, False)
    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------------------------ unreadable images


@pytest.mark.parametrize("keep", [0.0, 0.7])  # without a header; with one
def test_an_unreadable_image_is_replaced_and_counted_as_without_the_cache(folder, keep):
    truncate(folder / "val" / "bee" / "1.jpg", keep)
    args = run_args(folder, skip_unreadable=True)
    expected = batches(args, split="val")
    ours = batches(run_args(folder, skip_unreadable=True, cache_images=True), ALONE, "val", num_workers=2)
    assert equal(ours, expected)
    assert torch.cat([batch["replaced"] for batch in ours]).tolist() == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("keep", [0.0, 0.7])
def test_without_skipping_the_run_stops_before_training_and_names_the_file(folder, keep):
    truncate(folder / "train" / "bee" / "1.jpg", keep)
    with pytest.raises(UnreadableImage, match=r"train/bee/1.jpg'.*--skip-unreadable") as error:
        build(run_args(folder, cache_images=True), "train")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- one copy


def memory_files(pid="self"):
    """The memory files that a process has mapped, by inode."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "memfd:decoded" in line}


def as_rank(rank, world_size, port, folder, results):
    """One of several processes: share the cached images, load with workers, and report."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    processes = Processes(rank, world_size, torch.device("cpu"), local_rank=rank)
    dataset = build(run_args(folder, cache_images=True), "train", processes)
    inodes = memory_files()
    in_worker = next(iter(DataLoader(InodesOfWorker(), batch_size=None, num_workers=1)))
    own = batches(run_args(folder, cache_images=True), processes, num_workers=1)
    results.put((rank, inodes, in_worker, [{name: tensor.numpy() for name, tensor in batch.items()} for batch in own]))
    dist.barrier()
    del dataset
    dist.destroy_process_group()


class InodesOfWorker(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return memory_files()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def test_ranks_and_workers_share_one_copy(folder):
    context = multiprocessing.get_context("fork")
    results, port = context.Queue(), free_port()
    ranks = [context.Process(target=as_rank, args=(rank, 2, port, folder, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    reports = sorted((results.get(timeout=60) for _ in ranks), key=lambda report: report[0])
    for process in ranks:
        process.join(timeout=60)
    assert [process.exitcode for process in ranks] == [0, 0]
    (_, first, first_worker, _), (_, second, second_worker, _) = reports
    assert len(first) == 1
    assert first == second == first_worker == second_worker
    for rank, *_, own in reports:
        processes = Processes(rank, 2, torch.device("cpu"))
        own = [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in own]
        assert equal(own, batches(run_args(folder), processes))


def test_the_memory_is_shared_with_processes_that_were_not_forked(folder):
    (cached,) = cache_images([read_folder(folder, "val")], ALONE, False)
    sent = pickle.loads(pickle.dumps(cached))
    assert [image.tobytes() for image, _ in sent] == [image.tobytes() for image, _ in cached]
    assert len(memory_files()) == 1
    assert len(pickle.dumps(cached)) < 2_000  # the path, not the pixels


def test_nothing_can_write_into_the_shared_images(folder):
    (cached,) = cache_images([read_folder(folder, "val")], ALONE, False)
    image, _ = cached[0]
    before = image.tobytes()
    image.putpixel((0, 0), (1, 2, 3))
    assert cached[0][0].tobytes() == before
    with pytest.raises(ValueError, match="read-only"):
        cached._bytes[-1] = 0


def readable_memory_files(pid):
    try:
        return memory_files(pid)
    except (OSError, IndexError):  # no process, gone, or another user's
        return set()


def hold_cached(folder, ready):
    os.setsid()
    cached = cache_images([read_folder(folder, "train")], ALONE, False)
    ready.put(sorted(memory_files()))
    signal.pause()
    del cached


def files_in_shared_memory() -> set[str]:
    """Without the semaphores of whatever else runs on this machine."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


def test_nothing_is_left_behind_by_a_killed_run(folder):
    before = files_in_shared_memory()
    context = multiprocessing.get_context("fork")
    ready = context.SimpleQueue()
    process = context.Process(target=hold_cached, args=(folder, ready))
    process.start()
    (inode,) = ready.get()
    assert inode in readable_memory_files(process.pid)
    process.kill()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert not any(inode in files for files in map(readable_memory_files, os.listdir("/proc")))
    assert files_in_shared_memory() <= before


# -------------------------------------------------------------------------------------- enough memory


def test_more_images_than_memory_are_refused_with_both_numbers(folder, monkeypatch):
    images = read_folder(folder, "train")
    needed = 24 * 6 + sum(3 * width * height for width, height in map(images.size, range(6)))
    monkeypatch.setattr(cache, "available_memory", lambda: int(needed / 0.9) - 1)
    monkeypatch.setattr(cache, "GIB", 1000)
    with pytest.raises(UserError) as error:
        cache_images([images], ALONE, False)
    need, available = f"{needed / 1000:.1f} GiB", f"{needed / 900:.1f} GiB"
    numbers = f"needs {need} for decoded images, but may take only 90% of the {available} available"
    assert f"--cache-images {numbers}" in str(error.value)
    assert "leave it out, or use a machine with more memory" in str(error.value)
    monkeypatch.setattr(cache, "available_memory", lambda: int(needed / 0.9) + 1)
    assert [len(cached) for cached in cache_images([images], ALONE, False)] == [6]
    monkeypatch.setattr(cache, "available_memory", lambda: needed // 2)
    assert [len(cached) for cached in cache_images([SubsetOf(images, [0, 3])], ALONE, False)] == [2]


def test_both_splits_must_fit_before_any_image_is_decoded(folder, monkeypatch):
    splits = [Classification.data(run_args(folder), split, ALONE) for split in ("train", "val")]
    bases = [split.base for split in splits]
    needed = [24 * 6 + sum(3 * width * height for width, height in map(base.size, range(6))) for base in bases]
    monkeypatch.setattr(cache, "available_memory", lambda: int(sum(needed) / 0.9) - 1)
    monkeypatch.setattr(cache, "GIB", 1000)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_decode", None)
        with pytest.raises(UserError, match=f"--cache-images needs {sum(needed) / 1000:.1f} GiB"):
            cache_splits(splits, ALONE)
    assert [split.base for split in splits] == bases
    monkeypatch.setattr(cache, "available_memory", lambda: int(sum(needed) / 0.9) + 1)
    cache_splits(splits, ALONE)
    for split, base in zip(splits, bases, strict=True):
        assert isinstance(split.base, CachedImages)
        assert [image.tobytes() for image, _ in split.base] == [image.tobytes() for image, _ in base]


def test_the_cache_needs_linux(folder, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(UserError, match="--cache-images needs Linux"):
        cache_images([read_folder(folder, "train")], ALONE, False)


def write_machine(root, cgroup, groups):
    """A machine of 8 MiB free memory with these control groups: folder -> {file: text}."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text("MemTotal:       16384 kB\nMemAvailable:       8192 kB\n")
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for folder, files in groups.items():
        (root / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / "sys/fs/cgroup" / folder / name).write_text(text)
    return root


STAT = "anon 5\ninactive_file 300\nactive_file 40\n"


@pytest.mark.parametrize(
    ("cgroup", "groups", "expected"),
    [
        ("", {}, 8 << 20),  # no control groups
        ("0::/job/step\n", {}, 8 << 20),  # not visible
        ("0::/\n", {"": {"memory.max": "max\n", "memory.current": "7", "memory.stat": STAT}}, 8 << 20),  # no limit
        ("0::/\n", {"": {"memory.max": "5000\n", "memory.current": "1000\n", "memory.stat": STAT}}, 4340),
        (  # the limit is the parent's
            "0::/job/step\n",
            {
                "job": {"memory.max": "2000", "memory.current": "1000", "memory.stat": STAT},
                "job/step": {"memory.max": "max", "memory.current": "900", "memory.stat": STAT},
            },
            1340,
        ),
        (
            "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n",
            {
                "memory/job": {
                    "memory.limit_in_bytes": "3000",
                    "memory.usage_in_bytes": "2000",
                    "memory.stat": STAT + "total_inactive_file 500\ntotal_active_file 60\n",
                }
            },
            1560,
        ),
    ],
)
def test_available_memory_is_the_least_of_machine_and_control_groups(tmp_path, cgroup, groups, expected):
    assert available_memory(write_machine(tmp_path, cgroup, groups)) == expected


def test_this_machine_has_memory():
    assert 1 << 20 < available_memory() < 1 << 50


# ------------------------------------------------------------------------------------------ benchmark


def test_the_benchmark_prints_a_table_of_both(folder, capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    from benchmarks import cache as benchmark_cache

    options = "--input-size 32 --batch-size 2 --num-workers 1 --repeats 1 --warmup 0"
    benchmark_cache.main(["--data-path", str(folder), *options.split()])
    out = capsys.readouterr().out.splitlines()
    assert "6 images at 32 px, --aa rand-m9-mstd0.5-inc1" in out
    assert [line.split(" | ")[0] for line in out[-2:]] == ["| files", "| memory"]
    assert out[-2].endswith(" 1.00 |")
