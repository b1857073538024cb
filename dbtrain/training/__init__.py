"""One block on its workers: DeepSpeed engine, optimizer and schedule, loop."""
