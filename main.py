"""Training. Reads configs, checks them, builds, and runs the stages: autoencoder, then diffusion model on its latents.

    python main.py --base configs/ldm_txt2img.yaml -t                    all stages; what is finished already is used
    python main.py --base configs/ldm_txt2img.yaml -t --resume auto      goes on where an interrupted run stopped
    python main.py --base CFG -t --init-from RUN_OR_CHECKPOINT           begins with a model's weights, at step 0
    python main.py --base CFG --check trainer.max_steps=100              what it would do: sizes, memory, arithmetic

key=value arguments change the config; those that begin with stage1. change the config that autoencoder.config names.
Exit status: 0 done; 1 an error in the program; 2 a mistake in what was given, or a disk that is full; 3 loss or gradients were
inf or nan several times in a row; 130, 143, 138 stopped by Ctrl-C, SIGTERM, SIGUSR1. With 3 and the last three a checkpoint
of the last step is saved, and the same command with --resume auto goes on from it.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="main.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-b", "--base", nargs="+", default=[], metavar="CFG", help="config files, merged left to right")
    add("-t", "--train", action="store_true", help="train")
    add("-r", "--resume", metavar="RUN", help="run folder or .ckpt to go on from; auto: newest unfinished run of this name")
    add("--init-from", "--init_from", metavar="PATH", help="model whose weights to begin with (weights alone: step 0, new "
        "optimizer); --resume goes on with a run, and --resume auto beside this does where there is one to go on with")
    add("-n", "--name", help="of the run, in place of the config's")
    add("-p", "--postfix", help="added to the name of the run folder")
    add("-l", "--logdir", default="logs", help="folder of run folders (%(default)s)")
    add("-s", "--seed", type=int, help="in place of the configs' (23)")
    add("--no-test", "--no_test", action="store_true", help="no sheet of pictures at the end")
    add("--scale-lr", "--scale_lr", type=boolean, nargs="?", const=True, default=False, metavar="BOOL",
        help="multiply learning rates by devices x batch x accumulation (%(default)s)")
    add("--trust", action="store_true", help="run code that the checkpoint in autoencoder.ckpt names")
    add("--check", action="store_true", help="check everything, print the plan, and stop")
    add("overrides", nargs="*", metavar="key=value", help="changes to the config, such as trainer.max_steps=100")
    args = parser.parse_intermixed_args(argv)
    args.overrides += [word for word in args.base if "=" in word]  # `-b CFG key=value` reads as two configs
    args.base = [word for word in args.base if "=" not in word]
    args.alone = not args.base and not any(word.startswith("stage1.") for word in args.overrides)
    if not args.base and args.resume:  # a run folder, or a checkpoint in one, knows its config
        places = (Path(args.resume), Path(args.resume).absolute().parent.parent)
        args.base = [str(place / "config.yaml") for place in places if (place / "config.yaml").is_file()][:1]
    if args.init_from and args.resume not in (None, "auto"):
        parser.error("--init-from begins anew with a model's weights, --resume goes on with a run: give one of them")
    if not args.base:
        parser.error("which config? add --base configs/ldm_txt2img.yaml")
    if not (args.train or args.check):
        parser.error("nothing to do: add -t to train, or --check to see the plan")
    return args


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() in ("true", "yes", "1")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    from ldm.common.allocator import keep_memory

    keep_memory()
    from ldm.app import launch, runs, stages, starts, terminal  # torch is imported from here on
    from ldm.common.files import UserError

    terminal.set_up(launch.rank())
    try:
        planned, mistakes = stages.read(args.base, args.overrides, name=args.name, seed=args.seed, init_from=args.init_from)
        if mistakes:
            raise launch.OnAllRanks("\n".join(mistakes))
        planned = starts.placed(planned, args.resume not in (None, "auto"))
        if args.alone and args.resume not in (None, "auto"):
            planned = runs.alone(planned, args.resume)
        if args.check:
            return check(planned, args)
        starts.check_names(args.postfix)
        probe = [make_trainer(stage) for stage in planned][-1]
        if launch.needed(probe):
            if probe.num_nodes > 1:
                raise UserError(f"trainer.num_nodes: {probe.num_nodes} machines are started together, by torchrun or srun")
            return launch.start(probe.num_devices, [sys.executable, __file__, *argv])
        launch.join(probe)
        return run(planned, args, probe)
    except (UserError, OSError) as error:  # OSError: a disk that is full, a folder that cannot be written
        if launch.rank() == 0 or not isinstance(error, launch.OnAllRanks):
            terminal.report(str(error))
        return 2
    except FloatingPointError as error:
        if launch.rank() == 0:
            terminal.report(str(error))
        return 3
    except KeyboardInterrupt:  # outside of the training steps, where callbacks.stop looks after it
        terminal.say("interrupted; --resume auto goes on from the last checkpoint, where there is one")
        return 130
    except Exception:
        if launch.world() > 1:
            launch.fail()
        raise


def check(planned: list, args: argparse.Namespace) -> int:
    """Prints the plan; gives back 2 where something is in its way."""
    from ldm.app import plan, runs, stages, starts, survey, terminal

    made: dict = {}
    starts.check_names(args.postfix)
    problems = [mistake for stage in planned for mistake in stage.open(made)]
    world = survey.world(planned[-1].trainer)
    for stage in planned if args.scale_lr else ():
        stages.scale_lr(stage, world)
    surveys, more = survey.surveys(planned, world, args.trust)
    more += starts.checked([found.stage for found in surveys], [found.module for found in surveys], args.trust)
    if not problems and not more:
        runs.jobs(planned, args.logdir, args.resume, args.postfix)
    for found in surveys:
        terminal.say("\n  ".join(plan.summary(found) + plan.details(found)))
    terminal.report("\n".join(problems + more))
    return 2 if problems or more else 0


def run(planned: list, args: argparse.Namespace, group) -> int:
    """All stages; every process walks through them. group: a Trainer, for what it knows of the other processes."""
    from ldm.app import launch, plan, runs, stages, starts, survey, terminal

    tell = terminal.say if group.is_global_zero else terminal.silent
    made: dict = {}
    mistakes = [mistake for stage in planned for mistake in stage.open(made)]
    for stage in planned if args.scale_lr else ():
        stages.scale_lr(stage, group.world_size)
    surveys, more = survey.surveys(planned, group.world_size, args.trust)
    if args.resume in (None, "auto"):
        more += starts.checked([found.stage for found in surveys], [found.module for found in surveys], args.trust)
    if mistakes + more:
        raise launch.OnAllRanks("\n".join(mistakes + more))
    launch.in_turn(group, lambda: [survey.prepare(found.module) for found in surveys])
    jobs, notes = launch.decided(group, lambda: runs.jobs(planned, args.logdir, args.resume, args.postfix))
    for note in notes:
        tell(note)
    checkpoint, by_number = None, {found.stage.number: found for found in surveys}
    for job in jobs:
        found = by_number[job.number]
        if job.action == "reuse":
            checkpoint = job.checkpoint
            tell(f"{found.stage.label}: finished already, {job.run} is used (same config and data)")
            for line in [*runs.kept_sampling(job, found.stage), *runs.other_batch(job, found.stage, found.global_batch)]:
                tell(line)
            continue
        checkpoint, signal = train(job, found, checkpoint, args, group, tell)
        if signal is not None:
            launch.leave()
            return 128 + signal
    for line in plan.closing(planned[-1], checkpoint):
        tell(line)
    launch.leave()
    return 0


def train(job, survey, before: Path | None, args: argparse.Namespace, group, tell) -> tuple[Path, int | None]:
    """One stage, to its end or to a signal -> its last checkpoint, and the signal. before: stage 1's checkpoint."""
    from time import monotonic

    from pytorch_lightning import seed_everything

    from ldm.app import guards, launch, parts, plan, runs, starts
    from ldm.callbacks import checkpoints, clock, dashboard, images, metrics, progress, promises, seeding, stop
    from ldm.common.config import Checkpoint, Logging, section

    began, stage = monotonic(), survey.stage
    logging, saving = section(stage.config, Logging), section(stage.config, Checkpoint)
    seed_everything(stage.seed, verbose=False)
    autoencoder, block = parts.autoencoder_of(stage, job.checkpoint or before, args.trust)
    module = parts.make_module(stage, autoencoder, stage.picture)
    if stage.init_from and (job.action == "train" or stage.lora):  # what a run that goes on has of a LoRA is the changes
        tell(starts.begin(stage, module, args.trust))
    launch.decided(group, lambda: guards.keeps_autoencoder(job, stage, module, args.logdir, args.trust))
    guards.settle_latents(stage, module, group.strategy.root_device, job.action == "resume", tell)
    need = (saving.keep + 1) * survey.checkpoint
    for line in runs.other_batch(job, stage, survey.global_batch):
        tell(line)
    folder = launch.decided(group, lambda: runs.run_folder(job, stage, module, args.logdir, args.postfix, need,
                                                           survey.global_batch))  # fmt: skip
    tell("\n  ".join([*plan.summary(survey), *stage.train.report().splitlines(), f"run folder {folder}"]))

    timer, stopper = clock.Clock(), stop.Stop()
    saver = checkpoints.Checkpoints(folder / "checkpoints", saving.every, saving.keep, parts.describer(stage, block), timer)
    boards = [dashboard.Dashboard(folder, stage.config, logging.wandb)] if logging.wandb and group.is_global_zero else []
    try:
        data, validation, panel = parts.prepared(stage, module, args.logdir, group.strategy.root_device, tell)
        pictures = images.Pictures(panel, folder / parts.PICTURES[stage.kind], logging.images_every, timer, boards)
        trainer = make_trainer(stage, plugins=[saver.io], callbacks=[
            timer, *upkeep(stage, folder), seeding.Seeding(stage.seed), promises.Promises(tell),
            metrics.Metrics(folder / "metrics.jsonl", logging.every, timer, boards),
            progress.Progress(stage.label, survey.steps, tell, survey.seconds), pictures, stopper, saver,
        ])  # fmt: skip
        tell(f"{stage.label}: training; pictures in {pictures.folder}, numbers in {folder / 'metrics.jsonl'}")
        try:
            trainer.fit(module, parts.endless(stage, module, data), parts.one_pass(stage, validation), ckpt_path=job.checkpoint)
        except FloatingPointError:  # nothing of it has reached the weights
            saver.save(trainer)
            tell(f"{stage.label}: the last finite weights, of step {trainer.global_step}, are in {saver.last}")
            raise
        if stopper.signal is None:
            module.to(trainer.strategy.root_device)
            tell(parts.finish(stage, module))
        saver.save_final(trainer)
        seconds = runs.add_seconds(folder, monotonic() - began) if trainer.is_global_zero else 0
        if stopper.signal is not None:
            tell(f"{stage.label}: stopped at step {trainer.global_step}, saved as {saver.last}; the same command with "
                 "--resume auto goes on from there")  # fmt: skip
            return saver.last, stopper.signal
        if not args.no_test:
            pictures.draw(trainer, module, trainer.global_step, "final.png")
        if trainer.is_global_zero and stage.lora:
            tell(f"{stage.label}: written for diffusers, and for --lora: {starts.write_lora(module, folder)}")
        if trainer.is_global_zero:
            runs.write_done(folder, stage, "checkpoints/last.ckpt", steps=trainer.global_step, images=module.images_seen,
                            seconds=seconds)  # fmt: skip
        tell(f"{stage.label}: done in {progress.duration(monotonic() - began)}; {timer.shares()}")
        trainer.strategy.barrier()
        return saver.last, None
    finally:
        for board in boards:
            board.finish()


def upkeep(stage, folder) -> list:
    """Callbacks that belong to the training module of a stage; an autoencoder's does the same by itself."""
    from ldm.callbacks.ema import EmaUpdate
    from ldm.callbacks.finite import FiniteGradients

    return [FiniteGradients(), EmaUpdate(folder / "averages")] if stage.kind != "autoencoder" else []


def make_trainer(stage, **options):
    """Lightning's Trainer for a stage. UserError for arguments that it refuses."""
    from pytorch_lightning import Trainer
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from ldm.app import terminal
    from ldm.common.config import Validation, section
    from ldm.common.files import UserError

    terminal.hush("pytorch_lightning", "lightning_fabric")
    validation = section(stage.config, Validation)
    said = {"max_epochs": -1, **stage.trainer}
    if stage.trainer.get("strategy") == "fsdp2":
        import_module("ldm.callbacks.sharded")  # Lightning knows it by its name from then on
        said["inference_mode"] = False  # weights that validation puts together are used by training
    try:
        return Trainer(**said, **options, logger=False, use_distributed_sampler=False, enable_model_summary=False,
                       enable_progress_bar=False, num_sanity_val_steps=0, check_val_every_n_epoch=None,
                       val_check_interval=validation.every * stage.accumulate, limit_val_batches=validation.batches,
                       enable_checkpointing=bool(options))  # fmt: skip
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    sys.exit(main())
