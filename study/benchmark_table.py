"""The results of `bench.py` as a Markdown table."""

from study.benchmark import INDEX_SIZE, NUM_DUPLICATE_IMAGES, NUM_PREDICTIONS


def format_table(results: dict) -> str:
    """The content of bench.json as a Markdown table."""
    rows = [("", "reference", "ours", "ratio"), ("---",) * 4]
    for side, rates in results.get("input", {}).items():
        for name in ("cold", "warm"):
            reference, ours = rates["reference"], rates[name]
            title = f"input, {side} px, {name}, images/s per core"
            rows.append((title, f"{reference:.0f}", f"{ours:.0f}", f"{ours / reference:.1f}x"))
    rows += _step_rows(results["step"]) if "step" in results else []
    if epoch := results.get("epoch"):
        for name in ("training", "evaluation"):
            rows.append((f"{name} from the cache, batch {epoch['batch_size']}, images/s", "", _rate(epoch[name]), ""))
        rows.append(("share of the training spent waiting for input", "", f"{epoch['input_wait']:.2%}", ""))
    rows += _scaling_rows(results["scaling"]) if "scaling" in results else []
    if sharing := results.get("sharing"):
        alone, together = sharing["alone"], sharing["together"]
        title = "two trainings at once (reference: one alone), 64 px, images/s"
        rows.append((title, f"{alone:.1f}", f"{together:.1f}", f"{together / alone:.2f}x"))
    if evaluation := results.get("evaluation"):
        reference, ours = (evaluation["resamples_per_second"][name] for name in ("reference", "ours"))
        title = f"bootstrap of {NUM_PREDICTIONS:,} predictions, resamples/s"
        rows.append((title, f"{reference:.2f}", f"{ours:.0f}", f"{ours / reference:.0f}x"))
        seconds = f"{evaluation['near_duplicates_s']:.1f}"
        rows.append((f"near-duplicates among {NUM_DUPLICATE_IMAGES:,} images, s", "", seconds, ""))
    for side, rates in results.get("predict", {}).items():
        cached, files = rates["cached"], rates["files"]
        title = f"predict.py from {side} px files (reference: evaluation from the cache), images/s"
        rows.append((title, f"{cached:.2f}", f"{files:.2f}", f"{files / cached:.2f}x"))
    for count, seconds in results.get("startup", {}).items():
        first, second = (f"{seconds[name]:.2f}" for name in ("first_s", "second_s"))
        rows.append((f"start with {count} files, first / second time, s", "", f"{first} / {second}", ""))
    for name, megabytes in results.get("memory_mb", {}).items():
        rows.append((f"memory with {INDEX_SIZE:,} images, MB: {name}", "", f"{megabytes:.0f}", ""))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _step_rows(step):
    rows = []
    for batch_size, rates in step["batches"].items():
        title = f"training step, batch {batch_size}, images/s ({step['precision']})"
        if rates is None:
            rows.append((title, "", "out of memory", ""))
            continue
        reference, ours = rates["reference_images_per_second"], rates["images_per_second"]
        rows.append((title, _rate(reference), _rate(ours), f"{ours / reference:.2f}x"))
        shares = f"{rates['reference_share_of_peak']:.0%}", f"{rates['share_of_peak']:.0%}"
        rows.append((f"share of the matrix peak, {step['peak_gflops']:.0f} GFLOP/s", *shares, ""))
        muon = rates["muon_images_per_second"]
        title = f"with --optimizer muon (reference: adamw), batch {batch_size}, images/s"
        rows.append((title, _rate(ours), _rate(muon), f"{muon / ours:.2f}x"))
    return rows


def _scaling_rows(scaling):
    """The reference of N processes is N times one alone, so that the ratio is the efficiency."""
    rows, one = [], scaling["processes"]["1"]["together"]
    for number, rates in scaling["processes"].items():
        title = f"training by {number} process{'es' * (number != '1')}, {scaling['batch_size']} images each"
        title += f", {scaling['side']} px, images/s"
        perfect = int(number) * one
        rows.append((title, _rate(perfect), _rate(rates["together"]), f"{rates['together'] / perfect:.2f}x"))
        if number != "1":
            gradients = rates["together"] * (1 / rates["no_sync_bn"] - 1 / rates["alone"])
            statistics = rates["together"] * (1 / rates["together"] - 1 / rates["no_sync_bn"])
            title = f"share of the time for exchanging {scaling['gradient_mb']:.0f} MB of gradients / for `--sync_bn`"
            rows.append((title, "", f"{max(0, gradients):.0%} / {max(0, statistics):.0%}", ""))
    return rows


def _rate(images_per_second):
    return f"{images_per_second:.2f}" if images_per_second < 100 else f"{images_per_second:.0f}"
