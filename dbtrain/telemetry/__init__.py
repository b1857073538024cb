"""What a run tells of itself. The JSONL events are the truth; consoles, trackers and reports replay them."""
