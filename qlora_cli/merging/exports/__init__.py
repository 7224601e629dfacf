"""The formats of a merged model: 16-bit safetensors, NF4, GGUF, a Modelfile for Ollama."""
