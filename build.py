"""From arguments to parts: data, model, optimiser, the plan that follows from them, and the banner that tells it."""

import timm
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from arguments import brought_defaults
from datasets import DATASETS, build_loader
from drloc import Localiser, Trainee
from engine import Plan, Run
from samplers import EvalSampler, TrainSampler
from schedules import DRLOC_WARMUP_EPOCHS
from utils import Processes, StopSignal, UserError, logger


def build_eval_loader(args, processes: Processes, dataset):
    """This rank's share of a validation set; larger batches, as nothing is kept for a backward pass."""
    sampler = EvalSampler(len(dataset), processes.rank, processes.world_size)
    return build_loader(dataset, sampler, 2 * args.batch_size, args.num_workers, processes.device.type == "cuda")


def build_plan(args, processes: Processes, train_set) -> Plan:
    """Work out what follows from arguments, data and processes.

    Raises:
        UserError: a total batch that these processes cannot make up, or that the data cannot fill.
    """
    num_images = len(train_set)
    if num_images < args.total_batch:
        raise UserError(
            f"{num_images} training images are fewer than one --total-batch of {args.total_batch}; "
            f"choose one of at most {num_images}"
        )
    dtype, reason = choose_amp(args.amp, processes.device)
    return Plan(
        total_batch=args.total_batch,
        accumulation=accumulation(args, processes.world_size),
        updates_per_epoch=num_images // args.total_batch,
        epochs=args.epochs + args.cooldown_epochs,
        lr=args.lr if args.unscale_lr else args.lr * args.total_batch / 512,
        num_images=num_images,
        classes=list(train_set.classes),
        amp_dtype=dtype,
        amp_reason=reason,
    )


def accumulation(args, world_size: int) -> int:
    """Micro-steps of an update on so many processes.

    Raises:
        UserError: the total batch cannot be made up so; names the batch sizes that can.
    """
    at_once = args.batch_size * world_size
    if args.total_batch % at_once == 0:
        return args.total_batch // at_once
    share = args.total_batch // world_size if args.total_batch % world_size == 0 else 0
    fitting = [size for size in range(2, share + 1, 2) if share % size == 0]
    raise UserError(
        f"--batch-size {args.batch_size} x {world_size} processes does not divide "
        f"--total-batch {args.total_batch}; batch sizes that do: "
        f"{', '.join(map(str, fitting[-6:])) or 'none'}; or give --total-batch {at_once}"
    )


def choose_amp(choice: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The data type of the forward pass (None: float32), and why."""
    if choice == "off":
        return None, "--amp off"
    if choice != "auto":
        if choice == "fp16" and device.type != "cuda":
            raise UserError("--amp fp16 needs a GPU; use auto, bf16 or off")
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[choice], f"--amp {choice}"
    if device.type != "cuda":
        return None, f"no mixed precision by default on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return torch.bfloat16, f"this GPU (sm_{major}{minor}) has bf16"
    return torch.float16, f"this GPU (sm_{major}{minor}) has no bf16; with gradient scaling"


def build_model(args, num_classes: int, device: torch.device) -> nn.Module:
    """The model that the arguments describe, on ``device``; it has been tried on two black images.

    Raises:
        UserError: sizes that make no model, or none that gives similarity maps.
    """
    sizes = {"img_size": args.input_size, "patch_size": args.patch_size} | args.model_kwargs
    torch.manual_seed(args.seed)
    try:
        model = timm.create_model(
            args.model,
            num_classes=num_classes,
            last_block=args.last_block,
            similarity=args.sar_similarity,
            similarity_query=args.sar_query,
            proj_drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            **sizes,
        )
        model.to(device)
        with torch.inference_mode():
            black = torch.zeros(2, 3, args.input_size, args.input_size, device=device)
            _, similarity = model.eval()(black, return_similarity=True)
    except Exception as error:  # whatever a size that makes no sense trips over
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--model {args.model} with {sizes}: {reason}") from error
    if args.sar_weight > 0 and tuple(similarity.shape[-2:]) == (1, 1):
        raise UserError(
            f"--model {args.model} with {sizes}: S is a single patch and has no entropy; give a larger --input-size, a "
            "smaller --patch-size, or --sar-weight 0"
        )
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def build_trainee(args, num_classes: int, device: torch.device) -> Trainee:
    """The model, and DRLoc's localiser beside it where it has a weight; see ``build_model``."""
    model = build_model(args, num_classes, device)
    return Trainee(model, Localiser(model.num_features).to(device) if args.drloc_weight > 0 else None)


def build_mixup(args, num_classes: int) -> Mixup | None:
    """timm's Mixup and CutMix as the arguments say, or None where both are off."""
    if not (args.mixup or args.cutmix):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def build_optimizer(args, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """timm's optimiser of that name, fused where torch has a fused one."""
    options = {"eps": args.opt_eps} | ({"betas": tuple(args.opt_betas)} if args.opt_betas else {})
    if args.opt in ("adam", "adamw", "sgd"):
        options["fused"] = True
    if args.opt == "sgd":
        del options["eps"]
    try:
        return create_optimizer_v2(model, args.opt, lr=lr, weight_decay=args.weight_decay, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"--opt {args.opt}: {error}") from None


def wrap(args, plan: Plan, processes: Processes, trainee: Trainee) -> nn.Module:
    """What a step calls: ``trainee``, exchanging gradients between processes, compiled.

    Every parameter has a gradient in every step, so none is searched for, and the graph is always the same. torch can
    use that where it does not cut the graph itself (it compiles in parts, so that the exchange begins before the
    backward pass ends) and where every backward pass exchanges gradients.
    """
    network = trainee
    if processes.world_size > 1:
        ids = [processes.device.index] if processes.device.type == "cuda" else None
        network = DistributedDataParallel(
            trainee,
            device_ids=ids,
            gradient_as_bucket_view=True,
            static_graph=plan.accumulation == 1 and not args.compile,
        )
    return torch.compile(network) if args.compile else network


def build_run(args, plan: Plan, processes: Processes, stop: StopSignal, train_set) -> Run:
    """Put the parts of a training run together."""
    device = processes.device
    trainee = build_trainee(args, len(plan.classes), device)
    network = wrap(args, plan, processes, trainee)
    optimizer = build_optimizer(args, trainee, plan.lr)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=args.warmup_lr,
        min_lr=args.min_lr,
        cooldown_epochs=args.cooldown_epochs,
        decay_epochs=args.decay_epochs,
        decay_rate=args.decay_rate,
        step_on_epochs=not args.sched_on_updates,
        updates_per_epoch=plan.updates_per_epoch,
    )
    mixup = build_mixup(args, len(plan.classes))
    sampler = TrainSampler(
        plan.num_images,
        args.batch_size,
        plan.accumulation,
        processes.rank,
        processes.world_size,
        args.seed,
        views=3 if args.repeated_aug else 1,
    )
    return Run(
        args=args,
        plan=plan,
        processes=processes,
        trainee=trainee,
        network=network,
        ema=ModelEmaV3(trainee, decay=args.model_ema_decay) if args.model_ema else None,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(device.type, enabled=plan.amp_dtype == torch.float16),
        # Mixup's soft targets are smoothed already
        criterion=nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else args.smoothing),
        mixup=mixup,
        loader=build_loader(train_set, sampler, args.batch_size, args.num_workers, device.type == "cuda"),
        stop=stop,
    )


def _describe_loss(args) -> str:
    parts = ["cross-entropy"]
    if args.sar_weight > 0:
        similarity = "" if args.sar_similarity == "dot" else f" of {args.sar_similarity} similarity"
        parts.append(f"{args.sar_weight:g} ({args.sar_schedule}) x {args.sar_loss.replace('-', ' ')}{similarity}")
    if args.drloc_weight > 0:
        parts.append(f"{args.drloc_weight:g} (at its peak) x dense relative localisation")
    return " + ".join(parts)


def banner(run: Run) -> None:
    """Say what is about to happen, derived values included."""
    args, plan, processes = run.args, run.plan, run.processes
    parameters = sum(p.numel() for p in run.model.parameters())
    dtype = str(plan.amp_dtype or torch.float32).removeprefix("torch.")
    batch = f"{args.batch_size} a process x {processes.world_size} x {plan.accumulation} accumulated"
    lr = f"{plan.lr:g}" if args.unscale_lr else f"{args.lr:g} x {plan.total_batch}/512 = {plan.lr:g}"
    lines = {
        "model": f"{args.model}, {parameters:,} parameters, last block {args.last_block}",
        "data": f"{args.data_set} ({DATASETS[args.data_set].about}): {plan.num_images:,} training images",
        "input": f"{args.input_size} px in patches of {args.patch_size}",
        "loss": _describe_loss(args),
        "batch": f"{batch} = {plan.total_batch}; {plan.updates_per_epoch} updates an epoch",
        "length": f"{plan.epochs} epochs",
        "lr": f"{lr}, {args.sched} with {args.warmup_epochs} epochs of warm-up",
        "precision": f"{dtype} ({plan.amp_reason})",
        "device": f"{processes.device}, {torch.get_num_threads()} threads",
        "output": args.output_dir,
    }
    brought = brought_defaults(args)
    if brought:
        lines[f"{args.data_set} brings"] = ", ".join(f"{name} {value}" for name, value in brought.items())
    for name, text in lines.items():
        logger.info(f"{name:>14}  {text}")
    if args.warmup_epochs >= plan.epochs:
        logger.warning(
            f"--warmup-epochs {args.warmup_epochs} never end in {plan.epochs} epochs: lr stays below {plan.lr:g}"
        )
    if args.drloc_weight and plan.epochs <= DRLOC_WARMUP_EPOCHS:
        logger.warning(
            f"--drloc-weight {args.drloc_weight:g} is its weight at epoch {DRLOC_WARMUP_EPOCHS}, of {plan.epochs} here"
        )
