"""A running vLLM engine: how it is started, fed, read, watched and stopped. The only file beside ``registry.py`` that
imports vLLM (``connector.py`` aside, which vLLM's own processes import).

How states leave it. vLLM's ``extract_hidden_states`` speculation keeps chosen layers' outputs in KV-cache blocks, and a
connector writes them to a file when a request ends: for every position of prompt, image and answer but the last
token's, also under chunked prefill, preemption and prefix-cache hits, as the rows live where the KV cache lives. They
are the residual stream *before* the final norm.
"""

from __future__ import annotations

import gc
import importlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from teacher_cache.data.images import decoded
from teacher_cache.errors import TeacherCrashed, TeacherError
from teacher_cache.models.weights import first_line
from teacher_cache.teachers.vllm.jobs import Job, Mode, Outcome, VllmOptions
from teacher_cache.teachers.vllm.processes import (
    dismiss,
    environment,
    kill_when_orphaned,
    last_error,
    output_to,
    start_error,
)
from teacher_cache.teachers.vllm.registry import ENVIRONMENT, on_cpu

LENGTH_MARGIN = 2
"""Tokens of context that vLLM must have beyond the longest sequence.

Where any sequence of a step stands within one token of the limit, vLLM skips the drafter for that whole step
(``_input_fits_in_drafter``), and with it the states of every sequence in it.
"""

# On a CPU: no torch.compile of small helpers (15 to 35 s in the first batch), no pinning of threads to busy cores.
_CPU_ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class VllmSession:
    """A running engine, its processes and its scratch folder; ``close`` returns when their memory is free."""

    def __init__(
        self,
        mode: Mode,
        arguments: dict[str, Any],
        sampling: dict[str, Any],
        options: VllmOptions,
        layers: Sequence[int],
        image_processor: Any,
    ) -> None:
        """``arguments`` of ``vllm.LLM``; ``sampling`` that all requests share; ``layers`` whose outputs are captured
        (0: the embeddings, L: the last layer); ``image_processor``: the teacher's, None where it reads text alone.

        Raises ``TeacherError``: the engine did not start: with the cause, and what to set.
        """
        self.mode = mode
        self._unread = 0
        self._sampling, self._options = sampling, options
        self._scratch = tempfile.TemporaryDirectory(prefix="teacher-cache-", dir=options.scratch or None)
        self._log = Path(self._scratch.name) / "engine.log"
        self._started: list[Any] = []
        arguments = {**arguments, **_mode_arguments(mode, options, layers, self._scratch.name)}
        variables = {**ENVIRONMENT, **(_CPU_ENVIRONMENT if on_cpu() else {}), **options.environment}
        try:
            with environment(variables), output_to(self._log):
                from vllm import LLM

                self._llm = LLM(**arguments)
        except Exception as error:
            said = self._said()
            self._scratch.cleanup()
            raise start_error(str(arguments["model"]), error, said) from error
        _see_with(self._llm, image_processor)
        self._guard = kill_when_orphaned(self._family())
        self._wake_when_dead()

    def generate(
        self, jobs: Sequence[Job], then: Callable[[Job, Outcome], Job | None] | None = None
    ) -> Iterator[tuple[Job, Outcome]]:
        """Each job's outcome as it ends; ``then`` may give the job that follows it, which runs at once.

        At most ``max_sequences`` jobs more than can run are queued, so the files that wait here to be read are no
        more than twice that; each is deleted as it is read.
        """
        waiting, running = list(reversed(jobs)), dict[str, Job]()
        ended: list[tuple[Job, Any]] = []
        while waiting or running or ended:
            while waiting and len(running) + len(ended) < 2 * self._options.max_sequences:
                job = waiting.pop()
                running[self._submit(job)] = job
            fresh = [(running.pop(o.request_id), o) for o in self._step() if o.finished] if running else []
            # A file appears one engine step after its request ends, so those of the step before are there by now.
            for job, output in ended:
                outcome = self._read(job, output)
                self._unread -= 1
                yield job, outcome
                if then is not None and (following := then(job, outcome)) is not None:
                    running[self._submit(following)] = following
            ended = fresh

    def embed(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        """States of whole prompts from the ``token_embed`` pooler: (S, 1, d), after the final norm."""
        for start in range(0, len(jobs), self._options.max_sequences):
            batch = jobs[start : start + self._options.max_sequences]
            self._unread += len(batch)
            with self._watched():
                prompts = [self._prompt(job) for job in batch]
                outputs = self._llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
            for job, output in zip(batch, outputs, strict=True):
                read = np.asarray(output.prompt_token_ids, np.int64)
                self._unread -= 1
                yield job, Outcome((), "length", output.outputs.data[:, None], read)

    def _family(self) -> list[int]:
        """Process ids of the engine and of its workers."""
        psutil = importlib.import_module("psutil")  # comes with vLLM
        engines = [process.pid for process in self.processes()]
        return engines + [child.pid for pid in engines for child in psutil.Process(pid).children(recursive=True)]

    @property
    def idle(self) -> bool:
        """Whether every job that was begun has been read to its end."""
        return self._unread == 0

    def close(self) -> None:
        processes = self.processes()
        self._llm.llm_engine.engine_core.shutdown(timeout=2)
        for process in processes:
            process.join(timeout=30)
        dismiss(self._guard)
        del self._llm
        gc.collect()
        self._scratch.cleanup()

    def processes(self) -> list[Any]:
        """The engine's own processes (``multiprocessing.Process``); each may have workers below it."""
        resources = getattr(self._llm.llm_engine.engine_core, "resources", None)  # None: it runs in this process
        manager = getattr(resources, "engine_manager", None)
        return list(manager.processes) if manager is not None else []

    def events(self) -> dict[str, int]:
        """How often a running request gave up its blocks, and prompt tokens that were cached; see ``count_events``."""
        names = {"vllm:num_preemptions": "preemptions", "vllm:prefix_cache_hits": "cached prompt tokens"}
        return {names[m.name]: int(m.value) for m in self._llm.get_metrics() if m.name in names}

    def scratch_files(self) -> list[Path]:
        """What lies in the scratch folder now, the log aside."""
        return [path for path in Path(self._scratch.name).iterdir() if path != self._log]

    def _submit(self, job: Job) -> str:
        """Queue ``job``; returns the id that its output will carry.

        Priority is the job's place: a later turn goes before conversations that have not begun, while the blocks of
        its earlier turns are still in the prefix cache.
        """
        from vllm import SamplingParams

        self._unread += 1
        captured = job.capture and self.mode == "capture"
        sampling = SamplingParams(
            **self._sampling | ({} if job.seed is not None else {"temperature": 0.0, "top_p": 1.0}),
            max_tokens=job.max_tokens,
            seed=job.seed,
            logprobs=self._options.checked_ids or None if captured else None,
            flat_logprobs=captured,
            extra_args={"kv_transfer_params": {"include_output_tokens": True}} if captured else None,
        )
        with self._watched():
            (queued,) = self._llm.enqueue([self._prompt(job)], [sampling], priority=[job.place], use_tqdm=False)
        # Inside, the engine appends "-" and eight random characters to the id that its outputs carry.
        return str(queued).rsplit("-", 1)[0]

    def _prompt(self, job: Job) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt_token_ids": list(job.prompt)}
        if job.images:
            prompt["multi_modal_data"] = {"image": [decoded(image) for image in job.images]}
        return prompt

    def _step(self) -> list[Any]:
        with self._watched():
            return list(self._llm.llm_engine.step())

    def _read(self, job: Job, output: Any) -> Outcome:
        """The outcome of a finished request; its connector's files are read and deleted."""
        said = output.outputs[0]
        outcome = Outcome(
            tuple(int(i) for i in said.token_ids),
            str(said.finish_reason),
            read_ids=np.asarray(output.prompt_token_ids, np.int64),
            cached_tokens=int(output.num_cached_tokens or 0),
        )
        if not (job.capture and self.mode == "capture"):
            return outcome
        from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as connector

        path = output.kv_transfer_params["hidden_states_path"]
        try:
            held = connector.load_hidden_states(path)
        except Exception as error:  # a file that is missing, cut off or not safetensors: the writer died
            raise self._crash(f"the states of {job.sample_id} were not written ({first_line(error)})") from error
        connector.cleanup_hidden_states(path)
        ids, logits = _flat_top(said.logprobs, len(outcome.token_ids))
        read = held["token_ids"].numpy().astype(np.int64)
        return replace(outcome, states=held["hidden_states"], read_ids=read, top_ids=ids, top_logits=logits)

    def _wake_when_dead(self) -> None:
        """Let :meth:`_step` hear of a killed process: vLLM 0.32's synchronous client notices it, closes its socket, and
        leaves whoever waits for the next output waiting for ever."""
        from vllm.v1.engine.exceptions import EngineDeadError

        self._started = self.processes()
        sentinels = [process.sentinel for process in self._started]
        outputs = getattr(self._llm.llm_engine.engine_core, "outputs_queue", None)
        if not sentinels or outputs is None:
            return

        def wait() -> None:
            connection.wait(sentinels)
            outputs.put_nowait(EngineDeadError())

        threading.Thread(target=wait, name="vllm-engine-watch", daemon=True).start()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Turn the death of an engine process into :class:`TeacherCrashed`."""
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            raise self._crash("a process of the vLLM engine died") from error
        except (VLLMValidationError, ValueError) as error:
            raise TeacherError(f"vLLM refuses the request: {first_line(error)}") from error

    def _crash(self, what: str) -> TeacherCrashed:
        processes = self._started  # vLLM forgets its processes when it notices their end
        for process in processes:
            process.join(timeout=5)  # its exit code comes a moment after its end, unless vLLM took it
        codes = ", ".join(str(p.exitcode) for p in processes if p.exitcode is not None) or "unknown"
        return TeacherCrashed(
            f"{what} (exit code {codes}; its last words: {last_error(self._said())}). "
            "Exit code -9 is most often the system's out-of-memory killer: lower speed.gpu_memory_share or "
            "speed.tensor_parallel. Run the same command again to go on after the last committed shard."
        )

    def _said(self) -> str:
        return self._log.read_text(errors="replace") if self._log.is_file() else ""


def _see_with(llm: Any, image_processor: Any) -> None:
    """Give the front end, which makes the pixels in this process, the teacher's image processor with its settings.

    By itself it would resize with torchvision, whose pixels differ by a level or two from Pillow's: on noise that moves
    states by up to 0.15. It loads its processor anew for other arguments, so each is given it as it is handed out.
    """
    reader = llm.llm_engine.renderer.mm_processor
    if reader is None or image_processor is None:
        return
    load = reader.info.get_hf_processor

    def loaded(**arguments: Any) -> Any:
        processor = load(**arguments)
        processor.image_processor = image_processor
        return processor

    reader.info.get_hf_processor = loaded


def _mode_arguments(mode: Mode, options: VllmOptions, layers: Sequence[int], scratch: str) -> dict[str, Any]:
    if mode == "states":
        from vllm.config import PoolerConfig

        # use_activation would L2-normalise the rows
        pooler = PoolerConfig(task="token_embed", use_activation=False)
        return {"runner": "pooling", "convert": "embed", "pooler_config": pooler}
    generating = {
        "logprobs_mode": "raw_logits",
        "max_logprobs": max(options.checked_ids, 1),
        "enable_prefix_caching": True,
        "scheduling_policy": "priority",
        "disable_log_stats": not options.count_events,
    }
    if mode == "plain":
        return generating
    connector = "CpuCapturedRequestsConnector" if on_cpu() else "CapturedRequestsConnector"
    return {
        **generating,
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(layers)}},
        },
        "kv_transfer_config": {
            "kv_connector": connector,
            "kv_connector_module_path": "teacher_cache.teachers.vllm.connector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": scratch},
        },
    }


def _flat_top(flat: Any, tokens: int) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.float32] | None]:
    """(n, k) ids and raw logits of ``FlatLogprobs``, whose k + 1 entries a token begin with the sampled id."""
    if flat is None or not tokens:
        return None, None
    ids = np.asarray(flat.token_ids, np.int64).reshape(tokens, -1)[:, 1:]
    logits = np.asarray(flat.logprobs, np.float32).reshape(tokens, -1)[:, 1:]
    return ids, logits
