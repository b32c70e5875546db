"""Put the plans in the core's place; imported when the first adapter is put on a model. Without it the core runs every tree."""

from __future__ import annotations

from omnilora.core import layer
from omnilora.plans import executor, quick, rows
from omnilora.plans.blocks import host

layer.executor = executor.execute
layer.quicken = quick.quicken
layer.rows_executor = rows.execute
layer.placed.append(host.install)
layer.removed.append(host.remove)
