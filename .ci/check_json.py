"""Checks the shape of what `late_fusion --json` writes: the names, one accuracy a seed, weights that sum to 1."""

import json
import math
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    result = json.load(file)
assert isinstance(result["data"], str) and result["data"], "data"
methods = {method["name"]: method for method in result["methods"]}
assert len(methods) == len(result["methods"]), "a name twice"
wanted = {"naive", "uniform", "offline-loss", "online-loss", "online-gradient-epoch", "online-gradient-step"}
assert wanted <= methods.keys(), f"missing: {wanted - methods.keys()}"
assert any(name.startswith("alone:") for name in methods), "no modality alone"
seeds = {len(method["accuracy"]) for method in methods.values()}
assert len(seeds) == 1 and seeds.pop() >= 1, "accuracies of different numbers of seeds"
for name, method in methods.items():
    assert all(0.0 <= accuracy <= 1.0 for accuracy in method["accuracy"]), name
    assert all(math.isfinite(weight) for weight in method["weights"]), name
    assert abs(sum(method["weights"]) - 1.0) < 1e-6, (name, method["weights"])
    assert method["train_seconds"] > 0.0 and method["blend_seconds"] >= 0.0, name
print(f"{len(methods)} methods, as they should be")
