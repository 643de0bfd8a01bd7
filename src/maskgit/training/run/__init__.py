"""What a run of either stage needs beside its loop: folder, checkpoints, progress, processes."""
