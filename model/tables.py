"""A module with tables that nobody trains, such as the angles of rotary positions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class WithTables(nn.Module):
    """Its own buffers go with it to another device, but keep their format: an angle in bf16 would be off by 0.4 %."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WithTables:
        tables = {name: table for name, table in self._buffers.items() if table is not None}
        super()._apply(fn, recurse)
        for name, table in tables.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != table.dtype:
                self._buffers[name] = table.to(moved.device)
        return self
