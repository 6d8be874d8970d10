"""A server of MCP written by hand, for tests, which does what the package's own never would:
`python mcp_raw_program.py [MODE]`. In the mode `stays` it goes on when nobody speaks with it any more."""

import json
import os
import sys
import time

PLAIN = {"type": "object", "properties": {}}
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TOOLS = [
    {"name": "fine", "inputSchema": PLAIN},
    {"name": "internal", "inputSchema": PLAIN},
    {"name": "custom", "inputSchema": PLAIN},
    {"name": "wrong_structure", "inputSchema": PLAIN, "outputSchema": NUMBER},
    {"name": "wrong_result", "inputSchema": PLAIN},
    {"name": "not_text", "inputSchema": PLAIN},
    {"name": "any_schema", "inputSchema": {"type": "object", "properties": {"x": True}}},
    {"name": "no_properties", "inputSchema": {"type": "object", "properties": None}},
    {"name": "wrong_enum", "inputSchema": {"type": "object", "properties": {"x": {"enum": 5}}}},
    {"name": "open", "inputSchema": {"type": "object", "additionalProperties": True}},
]


def answered(request):
    method = request["method"]
    if method == "initialize":
        version = request["params"]["protocolVersion"]
        about = {"name": "raw", "version": "1"}
        return {"result": {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": about}}
    if method == "tools/list":
        return {"result": {"tools": TOOLS}}
    if method != "tools/call":
        return {"error": {"code": -32601, "message": "there is no such method"}}

    name = request["params"]["name"]
    if name == "internal":
        return {"error": {"code": -32603, "message": "upstream API returned 500"}}
    if name == "custom":
        return {"error": {"code": -32002, "message": "no such document"}}
    if name == "wrong_result":
        return {"result": {"content": "a string"}}
    fine = {"content": [{"type": "text", "text": f"fine {os.getpid()}"}]}
    return {"result": fine | ({"structuredContent": {"n": "x"}} if name == "wrong_structure" else {})}


for line in sys.stdin:
    request = json.loads(line)
    if "id" not in request:
        continue
    if request.get("params", {}).get("name") == "not_text":
        sys.stdout.buffer.write(b"\xff\xfe\n")
        sys.stdout.buffer.flush()
    print(json.dumps({"jsonrpc": "2.0", "id": request["id"], **answered(request)}), flush=True)
while sys.argv[1:] == ["stays"]:
    time.sleep(1.0)
