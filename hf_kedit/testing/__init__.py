"""What tests of hf_kedit, and of programs that use it, need: a Hub on this machine. Imports nothing of the library."""
