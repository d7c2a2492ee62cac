"""The cases, one file per part of protocol.md. A public function here is a case: its docstring is the promise."""
