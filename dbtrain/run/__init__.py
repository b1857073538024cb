"""What a run is: its plan, its manifest, its directory, and how it is prepared before anything trains."""
