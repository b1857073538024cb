"""Many blocks on many GPUs: placement and lifecycle are pure functions;
only the package ``ray`` below knows Ray.

What happens when a worker dies. How its death is noticed, and after how long, is the table of time-outs in
``docs/operations.md``. The paths here are below ``dbtrain/``.

1. ``coordinator/ray/attempt.py``: the attempt's thread returns from Ray Train's ``fit``; ``Attempt.over`` and
   ``error`` say so.
2. ``coordinator/controller.py``: ``Controller`` polls every attempt, reads the last events of its workers,
   and asks ``RunBlock`` in ``run/run.py`` which step is committed.
3. ``coordinator/exit_reasons.py``: ``classify`` makes an ``Exit`` of them: done, stopped, preempted, crashed
   or failed.
4. ``coordinator/lifecycle.py``: ``ended`` makes the block's next state of that, from its budgets: pending
   again, or final.
5. ``coordinator/block_records.py``: the state is written for ``dbtrain status``.
6. ``coordinator/controller.py``: when its pause is over and ``coordinator/placement.py`` finds room, the
   block gets its next attempt.
7. ``shards/storage/fence.py``: the controller claims the block for the new attempt before it starts any
   worker; from then on, whatever the old attempt still writes is refused.
8. ``coordinator/ray/attempt.py`` starts the workers; ``training/resumption.py`` finds the newest checkpoint
   that verifies.
9. ``training/loop.py`` trains on from there, with the batches and the noise that those steps would have had.
10. The other blocks notice nothing of all this.

A GPU or a node that dies takes its workers along, which is the same to a block; of a node,
``coordinator/placement.py`` also says what waits for it. When the command's own Ray ends,
``coordinator/ray/own_cluster.py`` tells it, and the same command continues.
"""
