"""Search over config keys: space.py what may vary; suggest.py what is tried next; prune.py what is stopped early;
trials.py what was tried; sweep.py trials as `vmm train` children; table.py and picture.py what came out."""
