"""seqjax against other libraries' recurrent layers: speed, memory, compile time and error."""
