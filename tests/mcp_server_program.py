"""A server of MCP tools, for tests: `python mcp_server_program.py [PORT]`, without one through its standard output."""

import asyncio
import os
import sys

from mcp.types import ImageContent, TextContent

try:
    from mcp.server import MCPServer
except ImportError:  # before version 2
    from mcp.server.fastmcp import FastMCP as MCPServer

server = MCPServer("notes")
notes: list[str] = []


@server.tool()
def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def keep(text: str) -> str:
    """Keep a note, and say how many there are."""
    notes.append(text)
    return f"{len(notes)} kept by {os.getpid()}"


@server.tool()
def variable(name: str) -> str:
    """Read an environment variable."""
    return os.environ.get(name, "")


@server.tool()
def refuse(text: str) -> str:
    """Fail."""
    raise ValueError(text)


@server.tool()
def picture() -> list[TextContent | ImageContent]:
    """Show a picture."""
    return [
        TextContent(type="text", text="Here it is."),
        ImageContent(type="image", data="aGk=", mimeType="image/png"),
    ]


@server.tool()
async def wait(seconds: float) -> str:
    """Wait."""
    await asyncio.sleep(seconds)
    return "waited"


@server.tool()
def die() -> str:
    """End the server."""
    os._exit(3)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        if hasattr(server, "settings") and hasattr(server.settings, "port"):
            server.settings.port = int(sys.argv[1])
            server.run("streamable-http")
        else:
            server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run("stdio")
