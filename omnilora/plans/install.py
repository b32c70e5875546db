"""Put the plans in the core's place; imported when the first adapter is put on a model. Without it the core runs every tree."""

from __future__ import annotations

from omnilora.core import layer, maps, mixed, op
from omnilora.plans import executor, quick, rows
from omnilora.plans.blocks import host

maps.executor = executor.execute
op.low_rank_squares = executor.squares
layer.quicken = quick.quicken
mixed.rows_executor = rows.execute
layer.placed.append(host.install)
layer.removed.append(host.remove)
