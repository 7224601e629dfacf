"""What a merged model is written as besides 16-bit safetensors: NF4, GGUF, a Modelfile for Ollama."""
