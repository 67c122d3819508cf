"""Running a deployed model: dispatch of experts, generation, receipts, and the main server."""
