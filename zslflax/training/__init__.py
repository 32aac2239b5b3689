"""Training. `setup` builds a run, `loop` drives it, and `step` updates the `train_state` once.

`input` brings batches to the devices; `forward` and `gradients` are parts of the step; `optimizer` updates parameters.
`workdir`, `metrics`, `stopwatch` and `preemption` see to the run's folder, its reports, its speed and its end.
"""
