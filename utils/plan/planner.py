"""Estimates the memory of a run on each GPU, without a GPU and without weights.

The real trainer makes two steps of a model with two and with three layers, on tensors without data (rehearsal.py);
every further layer adds as much as the third one did. engines.py then divides the result among the processes.
"""

import os

from utils.checks import flags
from utils.cli import arguments, recipes
from utils.cli.run import Run
from utils.data.rows import Rows
from utils.models import teacher
from utils.plan import asked
from utils.plan.engines import SHARES, Case, Estimate, Rehearsal, extend, shared_out
from utils.plan.longest import Longest
from utils.runtime.environment import GIB
from utils.runtime.errors import Refused, refuse_if
from utils.training import pace

CONTEXT = 1.0 * GIB  # about what the CUDA context, NCCL's buffers and the kernels' workspaces take; not estimated
ROW_FLAGS = ("max_length", "max_prompt_length", "max_completion_length", "lmbda", "seq_kd", "packing")


class Planner:
    """A command line with --plan, checked, and the estimates made for it and for changes of it.

    `on_gpu`: False counts what the losses allocate on a CPU, not in a GPU's kernels. Raises Refused.
    """

    def __init__(self, argv: list[str], name: str | None = None, on_gpu: bool = True):
        words = recipes.expand(argv)
        shared, name, problems = arguments.peek_shared(words, name)
        refuse_if(problems)
        self.name, self.method, self.on_gpu = name, arguments.EVERY[name], on_gpu
        engine, processes = asked.read_launch(shared, os.environ)
        os.environ["LAUNCH_PROCESSES"] = str(processes)  # the size of a rollout depends on it
        self.case = Case(tuple(recipes.translate(words, dict(self.method.renamed))), engine, processes)
        self.wants_table = shared.plan == "all"
        self.memory, visible = asked.read_memory(shared.gpu_memory)
        self.room = visible - CONTEXT
        self.rehearsals: dict[tuple, Rehearsal] = {}
        self.answers: dict[tuple, dict[str, float]] = {}
        self.longest_rows: dict[tuple, Longest] = {}
        self.run = self.read(self.case.words)
        common, config = self.run.common, self.run.config
        refuse_if([*flags.check_mode(common, name, self.method), *asked.missing_models(self.run)])
        models = asked.find_models(self.run)
        here = asked.count_layers(models.policy)
        if (path := config.value_model_path) and (there := asked.count_layers(models.find(path))) != here:
            text = f"{there} layers, and the policy has {here}: --plan needs the same number in both"
            raise Refused([f"--value_model_path {path}: {text}. Remove the flag to plan without it"])
        self.longest = self.find_longest(self.run)

    def read(self, words: tuple[str, ...]) -> Run:
        """The run of these flags, with the default that decides whether a reference model stays in memory."""
        common, config = arguments.parse(list(words), self.name, planned=True)
        run = Run(list(words), self.name, common, config, Rows([]))
        if config.max_steps < 1 and common.model_name_or_path and not common.plain:
            pace.compute_reference_once(run)
        return run

    def find_longest(self, run: Run) -> Longest:
        """The longest row under the flags of this run."""
        limits = tuple(getattr(run.config, name) for name in ROW_FLAGS)
        if limits not in self.longest_rows:
            self.longest_rows[limits] = Longest(run)
        return self.longest_rows[limits]

    def estimate(self, case: Case) -> Estimate:
        """The memory of each GPU of a Case."""
        key = case.words, case.engine in SHARES
        if key not in self.rehearsals:
            self.rehearsals[key] = self.rehearse(*key)
        return shared_out(self.rehearsals[key], case)

    def rehearse(self, words: tuple[str, ...], sharded: bool) -> Rehearsal:
        """The Rehearsal of one process alone, extended from two and three layers to all of them."""
        run = self.read(words)
        models = asked.find_models(run)
        layers = {"": asked.count_layers(models.policy)}
        layers |= {name: asked.count_layers(shape) for name, shape, _ in models.frozen}
        if min(layers.values()) <= 3:
            whole = self.rehearse_layers(words, sharded, max(layers.values()))
        else:
            two, three = (self.rehearse_layers(words, sharded, few) for few in (2, 3))
            whole = extend(two, three, layers)
        if run.config.seq_kd:
            whole.peaks["answers", ""] = self.rehearse_answers(run)
        return whole

    def rehearse_layers(self, words: tuple[str, ...], sharded: bool, layers: int) -> Rehearsal:
        """The Rehearsal in which every model has at most this many layers."""
        from utils.plan import rehearsal

        run = self.read(words)  # anew: a trainer changes its config
        longest, models = self.find_longest(run), asked.find_models(run, layers)
        run.tokenizer, run.train = longest.tokenizer, longest.batch(run.config.per_device_train_batch_size)
        return rehearsal.rehearse(run, models, longest.lengths, sharded, self.on_gpu)

    def rehearse_answers(self, run: Run) -> dict[str, float]:
        """{owner: bytes} while the whole teacher answers on each GPU, before the student is loaded (--seq_kd)."""
        from utils.plan import rehearsal

        config, lengths = run.config, self.find_longest(run).lengths
        path, revision = config.teacher_model_name_or_path or "", config.teacher_model_revision
        shape = asked.find_config(path, revision, config.trust_remote_code)
        how = config.answers_batch_size, lengths, run.common.dtype, bool(teacher.in_4bit(run.common, config))
        if how not in self.answers:
            self.answers[how] = rehearsal.rehearse_answers(shape, *how)
        return self.answers[how]
