"""How hidden states leave a vLLM engine: vLLM's own hidden-states connector, for captured requests only, also on a CPU.

vLLM imports this module by name inside its own processes; nothing else imports it, as it needs vLLM.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)


class CapturedRequestsConnector(ExampleHiddenStatesConnector):  # type: ignore[misc]
    """The shipped connector, but it writes a file only for requests that bring ``kv_transfer_params``.

    The shipped one writes the prompt's states of every request. Of a conversation of several turns only the last turn
    is captured (its sequence holds all the earlier ones), so that would be a file of megabytes for each turn before.
    """

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """Forget the file names of new requests that are not captured: then nothing is kept back or written."""
        meta = super().build_connector_meta(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            extra = request.sampling_params.extra_args if request.sampling_params else None
            if not (extra or {}).get("kv_transfer_params"):
                meta.new_req_filenames.pop(request.req_id, None)
                self._request_filenames.pop(request.req_id, None)
        return meta


class CpuCapturedRequestsConnector(CapturedRequestsConnector):
    """The same without CUDA streams and pinned memory, which the shipped one needs for its copy to the host.

    There is nothing to wait for: the rows are cloned out of the cache before its blocks are given back, and written
    at once. The lock file's lock is released by closing it, as in the shipped connector, and the reader waits for it.
    """

    def _submit_async_write(self, pending: PendingSave) -> None:
        if not self._is_tp_rank_zero:
            return
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)
        slots = (blocks[:, None] * self._block_size + torch.arange(self._block_size)).flatten()
        states = extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids)).clone()
        lock = self._lock_fds.pop(pending.req_id, None)
        if lock is None:
            lock = os.open(f"{pending.filename}.lock", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            Path(pending.filename).parent.mkdir(parents=True, exist_ok=True)
            save_file({"hidden_states": states, "token_ids": pending.token_ids.clone()}, pending.filename)
        finally:
            os.close(lock)
        self._req_copy_events[pending.req_id] = _Done()


class _Done:
    """Stands where the shipped connector keeps a CUDA event: this copy is over when it is asked."""

    def query(self) -> bool:
        return True
