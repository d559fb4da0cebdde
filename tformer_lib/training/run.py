"""A run in progress: the model, its optimizer, how far it has come, and its files."""

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tformer_lib import command_line, distributed
from tformer_lib.checkpoint import (
    check_like,
    check_not_quantised,
    is_of,
    load_weights,
    locked,
    part,
    read_metrics,
    read_tensors,
    require,
    save_tensors,
    weights_of,
    write_atomically,
)
from tformer_lib.generation import generate
from tformer_lib.mixture_of_experts import mixtures, update_selection_biases
from tformer_lib.tokens import END_OF_TEXT, Corpus, Encoding, save_encoding
from tformer_lib.training.captured import CapturedStep
from tformer_lib.training.config import TrainingConfig, config_from_dict, difference
from tformer_lib.training.data import (
    IGNORED,
    beginning,
    end_of_document,
    entropy_floor,
    evaluation_windows,
    fingerprint,
    fit_to_corpus,
    read_windows,
    replace_some,
    window_starts,
)
from tformer_lib.training.loss import accumulate_gradient, evaluate, is_chunked, mean_cross_entropy, training_loss
from tformer_lib.training.machine import interrupts, random_states, restore_random_states, seed_all
from tformer_lib.training.optimizer import learning_rate, make_optimizer, set_learning_rate, state_names
from tformer_lib.transformer import Decoder


def sample_text(model: Decoder, encoding: Encoding, prompt: list[int], count: int, **sampling) -> str:
    """Let the model go on from a prompt, for at most ``count`` tokens (and its context), and return the text it wrote.

    Args:
        model: the decoder.
        encoding: of its tokens.
        prompt: at least one token.
        count: the most tokens to write; it ends earlier where the model ends the text.
        sampling: the fields of :class:`tformer_lib.generation.Sampling`; by default temperature 0.8 and seed 0.

    Raises:
        ValueError: if the prompt is longer than the model's context.
    """
    if len(prompt) > model.config.max_length:
        raise ValueError(f"the prompt has {len(prompt)} tokens, the model reads {model.config.max_length}")
    stop = [encoding.eot_token] if END_OF_TEXT in encoding.special_tokens_set else []
    count = min(count, model.config.max_length - len(prompt) + 1)
    options = {"temperature": 0.8, "seed": 0, "max_new_tokens": count, "stop_tokens": stop, **sampling}
    tokens = generate(model, [prompt], **options)[0]
    return encoding.decode([token for token in tokens if token not in stop])


# A run


def choose_forms(model: Decoder, config: TrainingConfig) -> None:
    """Let the model compute as the config asks: the same function, by other kernels or in another type."""
    model.stack.fused_norms = config.fused_norms
    model.stack.residual_in_fp32 = config.residual_in_fp32
    for block in model.stack.blocks:
        block.feed_forward.fused_gelu = config.fused_gelu


class Run:
    """A training run in progress: the model, its optimizer, and how far it has come.

    In a world of several processes (torchrun) each of them makes a Run of the same config. Together they take the steps
    that one process would take: a batch is shared, and every process calls the same methods in the same order.

    Args:
        config: the settings.
        corpus: the text; read from ``config.data`` if not given.

    Raises:
        ValueError: if the settings do not fit the corpus, or a batch cannot be shared evenly.

    Attributes:
        world: which of how many processes this is.
        layout: what the processes share.
        network: what a step calls: the model, or what stands around it where it is trained by several processes.
        step: steps of the optimizer done.
        best: the lowest validation loss so far, in nats per token.
        history: every measurement, as in metrics.jsonl.
        val_tokens: how many predictions an evaluation averages over.
        floor: the mean loss that the source of the text itself would have on them, if it is known.
        last_loss: the training loss of the last step, a tensor on the device; None before the first.
        stopped_by: the number of the signal that stopped the training; None if none did.
    """

    def __init__(self, config: TrainingConfig, corpus: Corpus | None = None):
        self.corpus = corpus or Corpus.load(config.data)
        self.config = config = fit_to_corpus(config, self.corpus)
        self.world = distributed.world()
        kinds = {
            "context": config.context_parallel,
            "tensor": config.tensor_parallel,
            "experts": config.expert_parallel,
        }
        self.layout = distributed.Layout(self.world, scheme=config.parallel, **kinds)
        self.share = self.layout.share(config.batch, "a batch")
        self.layout.share(config.batch // config.accumulation, "a micro-batch")
        self.device = distributed.own_device(command_line.pick_device(config.device))
        if config.cuda_graph and (self.device.type != "cuda" or self.world.size > 1):
            where = f"{self.world.size} x {self.device.type}"
            raise ValueError(f"cuda_graph captures the steps of one process on a GPU, this run is on {where}")
        seed_all(config.seed)
        self.model = Decoder(config.model).to(self.device)
        choose_forms(self.model, config)
        self.network = self.layout.spread(self.model, config.context)
        self.optimizer = make_optimizer(self.model, config)
        if config.model.experts:
            self.optimizer.register_step_post_hook(lambda *_: self.balance_experts())
        self.average = weights_of(self.model, copy=True) if config.average else {}
        self.step, self.best, self.history, self.started = 0, math.inf, [], False
        self.last_loss, self.stopped_by = None, None
        end = end_of_document(self.corpus)
        windows = evaluation_windows(self.corpus.val, config.context, count=config.eval_windows, end_of_document=end)
        self.val_tokens = int((windows[1] != IGNORED).sum())
        self.val_inputs, self.val_targets = (x.to(self.device) for x in self.share_of_windows(*windows))
        self.floor = entropy_floor(self.corpus, windows[1])
        compiled = self.device.type == "cuda" if config.compile is None else config.compile
        compiled = compiled and self.layout.cut is None  # a compiler does not see what a ring sends
        here = config.batch // config.accumulation // self.layout.replicas * config.context
        self.chunked = config.tensor_parallel == 1 and is_chunked(config.chunked_loss, here, config.model.vocab_size)
        self.loss = partial(training_loss, chunked=self.chunked)
        if compiled:
            self.loss = distributed.compile_loss(self.network, self.loss, mean_cross_entropy)
        self.update = CapturedStep(self.update_weights, self.device) if config.cuda_graph else self.update_weights
        self.saver = distributed.Saver(self.out) if self.world.size > 1 else None
        if self.world.size > 1:  # dropout differs from process to process
            self.seed_anew()

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.config.out)

    @property
    def checkpoint(self) -> Path:
        """The file that holds all that is needed to go on."""
        return self.out / distributed.SINGLE

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products in bfloat16 where config and device say so; weights, norms and the loss stay in float32."""
        wanted = self.config.dtype
        if wanted == "auto":
            wanted = "bfloat16" if self.device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
        if wanted == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def take_step(self) -> tuple[Tensor, Tensor]:
        """One step of the optimizer; returns the loss of this process's share, and the norm before clipping."""
        inputs, targets = self.next_batch()
        set_learning_rate(self.optimizer, learning_rate(self.step, self.config))
        loss, norm = self.update(inputs, targets)
        self.step += 1
        self.last_loss = loss
        self.update_average()
        return loss, norm

    def update_weights(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Forward, backward, clipping and the optimizer: all that a step does on the device."""
        loss = accumulate_gradient(self.batch_loss, inputs, targets, self.config.accumulation, self.announce)
        norm = self.layout.clip_gradients(self.model, self.config.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def announce(self, last: bool) -> None:
        """Let the gradients of a step travel between processes with its last micro-batch, and not before."""
        distributed.announce_piece(self.network, last)

    def balance_experts(self) -> None:
        """Move the experts' selection biases by the loads of the whole batch, whichever processes have read it."""
        for mixture in mixtures(self.model):
            mixture.load.copy_(self.world.sum(mixture.load))
        update_selection_biases(self.model)

    def update_average(self) -> None:
        """Move the average towards the weights of now; at first in larger steps, to forget the random start."""
        if self.average:
            memory = min(self.config.average, self.step / (self.step + 9))
            averages, weights = (
                [distributed.own(x) for x in d.values()] for d in (self.average, weights_of(self.model))
            )
            torch._foreach_lerp_(averages, weights, 1 - memory)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the averaged weights, if the run keeps them, and afterwards with its own again."""
        own = weights_of(self.model, copy=True) if self.average else {}
        if self.average:
            load_weights(self.model, self.average)
        try:
            yield
        finally:
            distributed.free_gathered(self.network)
            if self.average:
                load_weights(self.model, own)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """This process's windows of the step to come, (batch / processes, context) int64 each, on the device."""
        starts = window_starts(len(self.corpus.train), self.config, self.step)
        inputs, targets = read_windows(self.corpus.train, starts, self.config.context)
        windows = replace_some(inputs, self.config, self.step)[self.share], targets[self.share]
        windows = tuple(map(self.layout.part, windows))
        if self.device.type == "cuda":  # from pinned memory the copy does not wait for the step before
            windows = tuple(x.pin_memory() for x in windows)
        return tuple(x.to(self.device, non_blocking=True) for x in windows)

    def batch_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of one micro-batch, in the run's precision."""
        with self.autocast():
            return self.loss(self.network, inputs, targets)

    def evaluate(self) -> float:
        """Measure the validation loss, record it, and keep the weights if they are the best so far.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        with self.averaged():
            with self.autocast():
                loss = evaluate(self.model, self.val_inputs, self.val_targets, chunked=self.chunked)
                loss = self.mean_over_processes(loss)
            self.check_finite(loss, "validation loss")
            self.keep_best(loss)
        self.record(val_loss=loss, val_tokens=self.val_tokens, **({} if self.floor is None else {"floor": self.floor}))
        return loss

    def keep_best(self, loss: float) -> None:
        """Write the model's weights to best.safetensors if their validation loss is the lowest so far."""
        if loss < self.best:
            self.best = loss
            weights = {
                name: p.float() for name, p in distributed.whole_weights(self.model, self.layout.whole_view).items()
            }
            if self.world.is_first:
                save_tensors(self.out / "best.safetensors", weights, {**self.facts(), "val_loss": loss})

    def sample(self) -> str:
        """What the model writes now, from the beginning of a text."""
        with self.averaged(), self.layout.whole_windows():
            text = sample_text(self.model, self.corpus.encoding, beginning(self.corpus), self.config.sample_tokens)
        self.record(sample=text)
        return text

    def record(self, **values) -> None:
        """Append one measurement to the history and to metrics.jsonl."""
        line = {"step": self.step, **values}
        self.history.append(line)
        if not self.world.is_first:
            return
        path = self.out / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(as_line(line))
        except OSError as error:
            raise OSError(f"could not write {path}: {error.strerror}; the last checkpoint is kept") from error

    def facts(self) -> dict:
        """What a file of weights says about itself."""
        corpus = fingerprint(self.corpus)
        return {"config": asdict(self.config), "step": self.step, "corpus": corpus, "beginning": beginning(self.corpus)}

    def save(self) -> None:
        """Replace the checkpoint by one of now, atomically.

        Raises:
            FloatingPointError: if the loss, a weight or the optimizer's state is not finite; the checkpoint before it
                stays.
            OSError: if it cannot be written; the checkpoint before it stays.
        """
        if self.last_loss is not None:
            self.check_finite(self.world.mean(self.last_loss).item(), "loss")
        facts = {**self.facts(), "best": self.best}
        if self.saver is not None:
            self.saver.save(self.state(), facts, self.step)
            return
        tensors, states = random_states()
        save_tensors(self.checkpoint, tensors | self.state(), {**facts, "random": states})
        distributed.remove_others(self.out, None)  # those of several processes

    def state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint by name; where several processes share one, each holds its part."""
        view = self.layout.whole_view
        tensors = {f"weights.{name}": view(name, p) for name, p in weights_of(self.model).items()}
        tensors |= {f"average.{name}": view(name, x) for name, x in self.average.items()}
        names = {p: name for name, p in self.model.named_parameters()}
        for parameter, state in self.optimizer.state.items():
            name = names[parameter]
            tensors |= {f"optimizer.{name}.{key}": view(name, value) for key, value in state.items()}
        return tensors

    def check_finite(self, value: float, name: str) -> None:
        """Stop a run whose numbers have left the finite ones: nothing of it is worth saving."""
        if not math.isfinite(value):
            kept = "; the last checkpoint is kept" if self.checkpoint.exists() else ""
            raise FloatingPointError(
                f"the {name} is {value} at step {self.step}: try a lower learning_rate or a longer warmup{kept}"
            )

    @classmethod
    def resume(cls, out: str | Path, corpus: Corpus | None = None, **changes) -> "Run":
        """The run of that folder, as its last checkpoint left it.

        Args:
            out: the run's folder.
            corpus: the text; read from the folder that the run's config names if not given.
            changes: fields of the config to change, such as ``device`` or a larger ``steps``.

        Raises:
            FileNotFoundError: if the folder has no checkpoint.
            ValueError: if the checkpoint is damaged, or of another configuration or corpus.
        """
        spread = distributed.newest(Path(out))
        source = Path(out) / distributed.SINGLE
        tensors, facts = ({}, spread[1]) if spread and not source.exists() else read_tensors(source)
        if spread and spread[1]["step"] >= facts.get("step", 0):  # a kill may leave both
            source, facts = spread
        if not {"config", "random"} & facts.keys():
            raise ValueError(f"{source} holds weights, but no training run")
        needed = {"config", "corpus", "step", "best"} | (set() if source.is_dir() else {"random"})
        require(facts, needed, str(source))
        for name, kind in (("step", int), ("best", float)):
            if not is_of(facts[name], kind):
                raise ValueError(f"{source} has a value of the wrong kind: {name} is {facts[name]!r:.40}")
            if not facts[name] >= 0:  # NaN is not either
                raise ValueError(f"{source} has a {name} that no run can have: {facts[name]}")
        run = cls(replace(config_from_dict(facts["config"], f"{source}: config"), out=str(out), **changes), corpus)
        if facts["corpus"] != fingerprint(run.corpus):
            raise ValueError(f"the run in {out} was trained on another corpus than {run.config.data} holds now")
        if source.is_dir():
            run.restore_spread(source, facts)
        else:
            run.restore(tensors, facts)
        return run

    def restore_spread(self, folder: Path, facts: dict) -> None:
        """Take over a checkpoint that several processes wrote, however many there are now.

        Dropout's random numbers go on from the seed and the step: how many streams there are has changed.
        """
        self.begin_optimizer(distributed.shapes(folder))
        distributed.load(folder, self.state())
        self.come_back(facts)
        self.seed_anew()

    def begin_optimizer(self, shapes: dict) -> None:
        """Give the optimizer the state that a checkpoint has of it, still empty: name -> shape and dtype."""
        for name, parameter in self.model.named_parameters():
            for key, (shape, dtype) in part(shapes, f"optimizer.{name}.").items():
                fused = self.optimizer.defaults["fused"]
                if shape == self.layout.whole_view(name, parameter).shape and shape:
                    empty = torch.zeros_like(parameter, dtype=dtype)  # spread as the parameter is
                else:
                    empty = torch.zeros(shape, dtype=dtype, device=self.device if fused else "cpu")
                self.optimizer.state[parameter][key] = empty

    def seed_anew(self) -> None:
        """Seed this process's random numbers by the run's seed, the step and the tokens that it reads."""
        seed_all(int(np.random.SeedSequence((self.config.seed, self.step, self.layout.replica)).generate_state(1)[0]))

    def come_back(self, facts: dict) -> None:
        """Take over how far a run had come."""
        self.step, self.best, self.started = facts["step"], facts["best"], True
        self.history = [line for line in read_metrics(self.out) if line.get("step", 0) <= self.step]

    def share_of_windows(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """This process's part of the evaluation's windows; all get equally many, of which the last may not count."""
        missing = -len(inputs) % self.layout.readers
        inputs, targets = F.pad(inputs, (0, 0, 0, missing)), F.pad(targets, (0, 0, 0, missing), value=IGNORED)
        mine = self.layout.share(len(inputs), "the evaluation's windows")
        return self.layout.part(inputs[mine]), self.layout.part(targets[mine])

    def mean_over_processes(self, loss: float) -> float:
        """The mean loss over all targets, from the mean over this process's."""
        if self.world.size == 1:
            return loss
        counted = int((self.val_targets != IGNORED).sum())
        total = self.world.sum(torch.tensor([loss * counted if counted else 0.0, counted], dtype=torch.float64))
        return (total[0] / total[1]).item()

    def restore(self, tensors: dict[str, Tensor], facts: dict) -> None:
        """Take over the state of a checkpoint: the inverse of :meth:`save`.

        Raises:
            ValueError: if something is missing, left over or of another shape; the message says what.
        """
        source = str(self.checkpoint)
        if self.world.size > 1:
            self.restore_shared(tensors, facts)
            return
        load_weights(self.model, part(tensors, "weights."), source)
        if self.average:
            average = part(tensors, "average.")  # copied below, for what was read is a map of the file
            check_like(average, self.average, f"{source}: average")
            check_not_quantised(average, f"{source}: average")
            self.average = {name: average[name].to(x, copy=True) for name, x in self.average.items()}
        states = part(tensors, "optimizer.")
        if facts["step"] and not states:
            raise ValueError(f"{source} is of another version: it lacks the optimizer's state")
        self.restore_optimizer(states, f"{source}: optimizer")
        self.come_back(facts)
        require(tensors, {"random.torch"}, source)
        require(facts["random"], {"python", "numpy"}, f"{source}: random")
        try:
            restore_random_states(tensors, facts["random"])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{source} has random states of another version: {error}") from error

    def restore_shared(self, tensors: dict[str, Tensor], facts: dict) -> None:
        """Take over the checkpoint of one process in several: each takes its part."""
        tensors = {name: x for name, x in tensors.items() if not name.startswith("random.")}
        self.begin_optimizer({name: (x.shape, x.dtype) for name, x in tensors.items()})
        state = self.state()
        check_like(tensors, state, str(self.checkpoint))
        for name, x in state.items():
            distributed.copy_whole(x, tensors[name])
        self.come_back(facts)
        self.seed_anew()

    def restore_optimizer(self, states: dict[str, Tensor], source: str) -> None:
        """Take over the optimizer's state; a parameter that never had a gradient has none."""
        parameters = dict(self.model.named_parameters())
        parameters = {n: p for n, p in parameters.items() if part(states, f"{n}.")}
        expected = {
            f"{name}.{key}": torch.zeros(()) if key == "step" else p
            for name, p in parameters.items()
            for key in state_names(self.optimizer, p)
        }
        check_like(states, expected, source)
        check_not_quantised(states, source)
        for name, parameter in parameters.items():
            state = part(states, f"{name}.")  # the step counts on the host, unless the optimizer is fused
            counter = parameter.device if self.optimizer.defaults["fused"] else "cpu"
            places = {key: counter if key == "step" else parameter.device for key in state}
            self.optimizer.state[parameter] = {
                key: x.to(places[key], parameter.dtype, copy=True) for key, x in state.items()
            }

    def start(self) -> None:
        """Make the run's folder and its first files.

        Raises:
            ValueError: if the folder holds another run.
        """
        spread = distributed.newest(self.out)
        if self.checkpoint.exists() or spread:
            facts = spread[1] if spread else read_tensors(self.checkpoint)[1]
            raise ValueError(
                f"{self.out} already holds a run: {difference(facts.get('config', {}), asdict(self.config))}"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out / "config.json", (json.dumps(asdict(self.config), indent=1) + "\n").encode())
        save_encoding(self.corpus.encoding, self.out)
        (self.out / "metrics.jsonl").unlink(missing_ok=True)
        self.started = True

    def train(self, *, quiet: bool = False) -> bool:
        """Train to the end, or until Ctrl-C (SIGTERM, a terminal that closes), then save.

        Args:
            quiet: show no progress bar and no samples.

        Returns:
            Whether the run came to its end; if not, ``stopped_by`` says which signal stopped it.

        Raises:
            FloatingPointError: if the loss or a weight is not finite any more; the last checkpoint is left as it was.
            BlockingIOError: if another process trains in the run's folder.
        """
        if self.world.size > 1 and not self.world.is_first:
            quiet = True
        with self.one_run_in_folder():
            if not self.world.is_first:
                self.started = True
            elif self.started:  # the log of what came after the checkpoint is written again
                write_atomically(self.out / "metrics.jsonl", "".join(map(as_line, self.history)).encode())
            else:
                self.start()
            with Progress(self, quiet) as progress, interrupts() as interrupted, self.peers_watched():
                stopped = self.take_steps(progress, interrupted)
                if stopped:
                    self.save()
                if self.saver is not None:
                    self.saver.finish()
        # one that heard of it from the others alone ends as if it had been asked to
        self.stopped_by = (interrupted[0] if interrupted else signal.SIGTERM) if stopped else None
        return not stopped

    def take_steps(self, progress: "Progress", interrupted: list[int]) -> bool:
        """Steps to the end, or until any process is asked to stop; returns whether one was."""
        if not self.history:
            progress.evaluated(self.evaluate())
        while not (stopped := self.world.any(bool(interrupted))) and self.step < self.config.steps:
            loss, norm = self.take_step()
            self.after_step(loss, norm, progress)
        return stopped

    @contextlib.contextmanager
    def one_run_in_folder(self) -> Iterator[None]:
        """Keep the run's folder for this run; the first process does it for all."""
        if not self.world.is_first:
            yield
            return
        self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out):
            yield

    @contextlib.contextmanager
    def peers_watched(self) -> Iterator[None]:
        """Say in one sentence what has happened where another process has gone.

        Raises:
            ConnectionError: in place of what the communication library says.
        """
        try:
            yield
        except RuntimeError as error:
            if not distributed.is_lost_peer(error):
                raise
            raise ConnectionError(
                f"process {self.world.rank} of {self.world.size} has lost another one at step {self.step}; the last "
                f"checkpoint is kept, and any number of processes can resume it: python -m tformer_lib.training resume "
                f"--out {self.out} (it was: {str(error).splitlines()[0]})"
            ) from error

    def after_step(self, loss: Tensor, norm: Tensor, progress: "Progress") -> None:
        """Log, evaluate, sample and save when it is time to."""
        config, last = self.config, self.step == self.config.steps
        if self.step % config.log_interval == 0 or last:
            values = self.world.mean(loss).item(), distributed.whole(norm).item()
            progress.logged(self.log(*values, progress.tokens_per_second()))
        if self.step % config.eval_interval == 0 or last:
            progress.evaluated(self.evaluate(), self.sample() if config.sample_tokens else None)
        if self.step % config.save_interval == 0 or last:
            self.save()
            progress.skip_time()
        elif self.saver is not None:
            self.saver.publish_if_done()

    def log(self, loss: float, norm: float, tokens_per_second: float) -> float:
        """Record the training loss, and stop if it is not finite."""
        self.check_finite(loss, "loss")
        self.check_finite(norm, "gradient's norm")
        rate = learning_rate(self.step - 1, self.config)
        self.record(loss=loss, learning_rate=rate, gradient_norm=norm, tokens_per_second=round(tokens_per_second))
        return loss


def as_line(measurement: dict) -> str:
    """A measurement as a line of metrics.jsonl."""
    return json.dumps(measurement, allow_nan=False) + "\n"


class Progress:
    """The live bar of a run: loss, validation loss, tokens per second, time left; and the samples as they come.

    A terminal that is gone, and so takes no more text, does not end the run.
    """

    def __init__(self, run: Run, quiet: bool):
        self.run, self.shown = run, {}
        self.bar = tqdm(total=run.config.steps, initial=run.step, unit="step", disable=quiet, dynamic_ncols=True)
        self.skip_time()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):
            self.bar.close()

    def skip_time(self) -> None:
        """Start the clock again, so that evaluating and saving do not count as training."""
        self.since, self.from_step = time.perf_counter(), self.run.step

    def tokens_per_second(self) -> float:
        """Since the clock was last started."""
        config, seconds = self.run.config, time.perf_counter() - self.since
        return (self.run.step - self.from_step) * config.batch * config.context / max(seconds, 1e-9)

    def logged(self, loss: float) -> None:
        """Show a new training loss and the speed."""
        speed = self.tokens_per_second()
        self.show(loss=f"{loss:.3f}", tok_s=f"{speed / 1e3:.1f}k" if speed < 1e6 else f"{speed / 1e6:.2f}M")
        self.skip_time()

    def evaluated(self, loss: float, sample: str | None = None) -> None:
        """Show a new validation loss, and the sample above the bar."""
        floor = self.run.floor
        self.show(val=f"{loss:.3f}" + ("" if floor is None else f" (floor {floor:.3f})"))
        if sample is not None and not self.bar.disable:
            with contextlib.suppress(OSError):
                self.bar.write(f"--- step {self.run.step}, validation loss {loss:.4f}\n{sample}\n")
        self.skip_time()

    def show(self, **values: str) -> None:
        """Bring the bar up to date."""
        self.shown |= values
        with contextlib.suppress(OSError):
            self.bar.set_postfix(self.shown, refresh=False)
            self.bar.update(self.run.step - self.bar.n)


def train(config: TrainingConfig, *, quiet: bool = False) -> Run:
    """Train from the beginning; returns the run with its model and history."""
    run = Run(config)
    run.train(quiet=quiet)
    return run
