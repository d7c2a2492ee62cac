"""Data sets: recordings to codes, and codes to recordings, for jobs of any length that die and are run again.

A job has one item for each recording. inputs.py finds the items, in an order that the inputs alone decide; an engine
(local_pool.py, ray_cluster.py) sends each through work.py, in processes that have loaded the weights; what comes back
is written in the items' order, by job.py, shard after shard (shards.py).

Rules of this room:

- What a job writes follows from its inputs, its options and its weights, to the byte. Nothing that is written depends
  on time, on the number of workers, or on what was killed when.
- Item N belongs to shard N // shard_rows, whether it can be encoded or not. Engines give results in the items' order.
  So the shards that are done are always the first ones, and to resume is to go on behind them.
- A shard counts once its line stands in manifest.jsonl. Whatever lies in the folder beyond that is removed, or written
  again, by the next run.
- A fault of one recording is a reason in quarantine.jsonl. Any other fault ends the job.
- Sound goes from a file into the process that encodes it, and nowhere else: what passes between processes are
  references and codes.
- Libraries that not everybody has (pyarrow, ray) are imported where they are used.
"""
