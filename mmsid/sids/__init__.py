"""The SID table and everything that needs only codes: collisions, trie, intrinsic metrics, exports."""
