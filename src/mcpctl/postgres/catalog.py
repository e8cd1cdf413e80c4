"""What there is to ask about: tables, and one table's columns, keys and indexes, as the caller's role may see them."""

import re
from typing import Any

from mcpctl.errors import Error, NotFoundError
from mcpctl.postgres import statement
from mcpctl.postgres.answer import Bounds, Rows
from mcpctl.postgres.session import Session

_NAME = re.compile(r"[\w$.-]{1,127}")
READABLE = """pg_catalog.has_schema_privilege(n.oid, 'USAGE')
 AND (pg_catalog.has_table_privilege(c.oid, 'SELECT') OR pg_catalog.has_any_column_privilege(c.oid, 'SELECT'))"""
"""Whether the role may read something of relation `c` in schema `n`: nothing else is ever named to it."""
_KIND = """CASE c.relkind WHEN 'r' THEN 'table' WHEN 'p' THEN 'partitioned table' WHEN 'v' THEN 'view'
 WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table' END"""

_TABLES = f"""
SELECT n.nspname AS schema, c.relname AS name, {_KIND} AS kind,
       CASE WHEN c.relkind IN ('v', 'f') OR c.reltuples < 0 THEN NULL ELSE c.reltuples::bigint END AS rows_estimated,
       pg_catalog.obj_description(c.oid, 'pg_class') AS comment
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND NOT c.relispartition
 AND n.nspname NOT LIKE 'pg\\_toast%' AND n.nspname NOT LIKE 'pg\\_temp%'
 AND CASE WHEN $1::text IS NULL THEN n.nspname NOT IN ('pg_catalog', 'information_schema') ELSE n.nspname = $1 END
 AND {READABLE}
ORDER BY 1, 2
"""

_TABLE = f"""
SELECT pg_catalog.jsonb_strip_nulls(pg_catalog.jsonb_build_object(
  'schema', n.nspname, 'name', c.relname, 'kind', {_KIND}, 'comment', pg_catalog.obj_description(c.oid, 'pg_class'),
  'columns', (SELECT pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
      'name', a.attname, 'type', pg_catalog.format_type(a.atttypid, a.atttypmod), 'nullable', NOT a.attnotnull,
      'default', pg_catalog.pg_get_expr(d.adbin, d.adrelid), 'comment', pg_catalog.col_description(c.oid, a.attnum)
    ) ORDER BY a.attnum)
    FROM pg_catalog.pg_attribute a LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
     AND pg_catalog.has_column_privilege(c.oid, a.attnum, 'SELECT')),
  'constraints', (SELECT pg_catalog.jsonb_agg(pg_catalog.pg_get_constraintdef(k.oid) ORDER BY k.contype DESC, k.conname)
    FROM pg_catalog.pg_constraint k WHERE k.conrelid = c.oid AND k.contype IN ('p', 'f', 'u', 'c')
     AND (pg_catalog.has_table_privilege(c.oid, 'SELECT') OR NOT EXISTS (SELECT FROM pg_catalog.unnest(k.conkey) a
          WHERE NOT pg_catalog.has_column_privilege(c.oid, a, 'SELECT')))
     AND (k.confrelid = 0 OR EXISTS (SELECT FROM pg_catalog.pg_class o WHERE o.oid = k.confrelid
          AND pg_catalog.has_schema_privilege(o.relnamespace, 'USAGE')
          AND pg_catalog.has_table_privilege(o.oid, 'SELECT')))),
  'indexes', (SELECT pg_catalog.jsonb_agg(pg_catalog.pg_get_indexdef(i.indexrelid) ORDER BY i.indexrelid)
    FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND NOT i.indisprimary
     AND pg_catalog.has_table_privilege(c.oid, 'SELECT'))
)) FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relname = $2 AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND {READABLE}
 AND CASE WHEN $1::text IS NULL THEN pg_catalog.pg_table_is_visible(c.oid) ELSE n.nspname = $1 END
"""


class NothingThereError(NotFoundError):
    """Nothing that the role may read has that name, which is whatever the caller has sent."""


async def tables(session: Session, schema: str | None, bounds: Bounds) -> Rows:
    """The tables and views that the role may read: schema, name, kind, estimated rows, comment."""
    found = await statement.run(session, _TABLES, bounds, [_param(schema)])
    if schema is not None and not found.count:
        raise NothingThereError(
            f"there is no schema {_said(schema)} with a table that you may read", "leave out `schema` to see all"
        )
    return found


async def table(session: Session, schema: str | None, name: str, bounds: Bounds) -> dict[str, Any]:
    """One table in full: columns with types and comments, constraints, indexes."""
    if schema is None and "." in name:
        schema, name = name.split(".", 1)
    found = await statement.run(session, _TABLE, bounds, [_param(schema), _param(name)])
    if found.note is not None:
        raise Error(
            f"what there is to say of {name!r} is more than an answer may have here", "ask the catalog for a part"
        )
    if not found.count:
        raise NothingThereError(
            f"there is no table {_said(name)}{f' in schema {_said(schema)}' if schema else ''} that you may read",
            "get_schema_info without arguments lists those there are",
        )
    described: dict[str, Any] = found.rows[0][0]
    return described


def _said(name: str) -> str:
    """A name that was not found: what has not the form of one is not repeated."""
    return repr(name) if _NAME.fullmatch(name) else "of that name"


def _param(text: str | None) -> bytes | None:
    if text is None:
        return None
    if "\0" in text:
        raise NotFoundError("a name cannot hold a NUL character")
    return text.encode("utf-8", "replace")
