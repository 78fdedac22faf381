"""The settings of `mimo-runtime serve`. Standard library only, like `mimo_runtime.config`."""

import os
from dataclasses import dataclass
from pathlib import Path

from mimo_runtime.config import EngineConfig


@dataclass(kw_only=True)
class ServeConfig(EngineConfig):
    """An OpenAI-compatible server over one engine: requests wait in one bounded queue and run one after another."""

    folder: str
    """release or BF16 folder, with its tokenizer"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 is every network of this machine"""
    port: int = 8000
    """port to listen on; 0 takes a free one, which is printed"""
    model_name: str | None = None
    """name of the model in the API; the name of the folder without it"""
    api_key_file: str | None = None
    """file with one API key a line (# starts a comment); without keys everyone may ask"""
    api_key_env: str | None = None
    """environment variable with API keys, separated by commas"""
    max_queue: int = 64
    """most requests that wait, of all clients together; more get status 429"""
    max_queue_per_client: int = 16
    """most requests of one client that wait; a client is an API key, or an address where there are no keys"""
    max_sessions: int = 0
    """most clients served at a time, others get status 429 until a session ends; 0 is any number"""
    session_seconds: float = 0.0
    """a session ends this long after its first request, and what runs with it; 0 is never"""
    idle_seconds: float = 300.0
    """a session ends when its client had no request waiting or running for this long"""
    max_prompt_tokens: int | None = None
    """longest prompt; max_len less one token without it"""
    max_output_tokens: int = 2048
    """most tokens of one answer, and what a chat request gets that names no number"""
    max_request_bytes: int = 1 << 20
    """largest body of a request"""
    io_seconds: float = 20.0
    """time for a client to send its request, and to take each piece of a stream; slower ones are cancelled"""
    max_connections: int = 1024
    """most open connections; more get status 503"""
    shutdown_seconds: float = 10.0
    """after SIGTERM or SIGINT the running request may go on for this long; waiting ones are refused at once"""

    def __post_init__(self) -> None:
        positive = ("max_queue", "max_queue_per_client", "max_output_tokens", "max_request_bytes", "max_connections")
        for name in (*positive, "idle_seconds", "io_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("max_sessions", "session_seconds", "shutdown_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; it must be 0 (any free one) to 65535")
        if self.max_prompt_tokens is not None and not 0 < self.max_prompt_tokens < self.max_len:
            raise ValueError(
                f"max_prompt_tokens is {self.max_prompt_tokens}; it must be above 0 and below max_len {self.max_len}"
            )

    @property
    def name(self) -> str:
        """Name of the model in the API."""
        return self.model_name or Path(self.folder).resolve().name

    @property
    def prompt_limit(self) -> int:
        """Longest prompt in tokens."""
        return self.max_prompt_tokens or self.max_len - 1

    def api_keys(self) -> list[str]:
        """The keys of file and environment. ValueError where one of them was named and holds none."""
        keys: list[str] = []
        if self.api_key_file is not None:
            if not Path(self.api_key_file).is_file():
                raise ValueError(f"api_key_file {self.api_key_file} does not exist; write one key a line into it")
            lines = Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
            found = [key for line in lines if (key := line.split("#", 1)[0].strip())]
            if not found:
                raise ValueError(f"api_key_file {self.api_key_file} holds no key; write one a line into it")
            keys += found
        if self.api_key_env is not None:
            found = [key for part in os.environ.get(self.api_key_env, "").split(",") if (key := part.strip())]
            if not found:
                raise ValueError(f"api_key_env names {self.api_key_env}, which holds no key; set it, or leave it out")
            keys += found
        return keys
