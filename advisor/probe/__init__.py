"""The dry run: the training's own code for a few steps on the real device, with random weights and the worst batch.

    measure.measure          a plan and a `Subject` → `Measurement`, in a process of its own
    find.find_largest        the largest micro-batch or sequence length that runs
    imitate.imitate          a smaller GPU rehearsed on a larger one
    prediction.predict       what the closed form and the trace say of the same plan
    results.calibration      what earlier probes on this machine measured

No part of it imports torch but what the process of its own runs: child, dry_run, meter, metered.
"""
