"""`jax.lax.scan` cut in three, with weights' gradients after the loop; knows nothing of dropout.

`dropout_scan` calls `scan_in_chunks`, which calls `scan_in_parts` for each chunk; `fdc.scan` calls
`scan_in_parts`. Read in this order:

- `hoisted_scan`: `scan_in_parts`, and the questions that decide how a scan runs.
- `flat_jaxpr`, `traced_scan`: the step as a list of equations, or why it is left as it is.
- `three_parts`, `run_parts`: which equations run before, in and after the loop.
- `weight_products`, `recomputed_operands`, `weight_gradients`: gradients that wait for its end.
- `affine`, `kept_values`, `linear_recurrence`: carries that need no loop.
- `checkpointed_scan`: `scan_in_chunks`, chunks that are computed again for the gradient.
- `scan`: the public function, and the explanation of what was cut.
"""
