"""`jax.lax.scan` cut in three, with weights' gradients after the loop; knows nothing of dropout.

Three functions are called `scan`. `dropout_scan` calls that of `checkpointed_scan`, which calls
that of `hoisted_scan` for each chunk. The one in `scan`, public as `fdc.scan`, calls that of
`hoisted_scan` too. Read in this order:

- `hoisted_scan`: the questions that decide how a scan runs.
- `flat_jaxpr`, `traced_scan`: the step as a list of equations, or why it is left as it is.
- `three_parts`, `run_loop`: which equations run before, in and after the loop.
- `weight_products`, `recomputed_operands`, `weight_gradients`: gradients that wait for its end.
- `affine`, `kept_values`, `linear_recurrence`: carries that need no loop.
- `checkpointed_scan`: chunks that are computed again for the gradient.
- `scan`: the public function, and the explanation of what was cut.
"""
