"""Every method on every prompt, side by side: runs, methods as text, peers, results, report."""
