"""For frameworks that are steered by YAML, where nobody writes ``callbacks=[...]``: axolotl, ms-swift, LLaMA-Factory.

All of them read the same ``matent:`` section. What is in it directly are the arguments of ``MatrixEntropyCallback``;
``plateau``, ``collapse``, ``alignment`` and ``printer`` hold those of ``PlateauStopping``, ``CollapseAlarm``,
``AlignmentCallback`` and ``ReadingPrinter``, or a list of such mappings for several of a kind.

```yaml
matent:
  every_n_steps: 50
  layers: all
  metrics: [matrix_entropy, effective_rank]
  probe: texts.txt
  plateau: {monitor: effective_rank/last, mode: any, min_delta: 0.5, patience: 5}
  collapse: {action: stop}
```

In YAML, ``probe`` is a text file with one text a line, a list of texts, or a mapping of names to these; the tokenizer
of the run makes batches of them, with 512 tokens of each text at most. ``dtype`` is ``float32`` or ``float64``.
Arguments that are Python objects (``mask``, ``stages``, process groups, a model as ``reference``) cannot be given.
An unknown or missing setting is an error before the model is loaded.
"""
