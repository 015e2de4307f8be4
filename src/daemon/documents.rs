//! What the engine tells, as the JSON documents of docs/json.md: times are RFC 3339, byte strings are [`Bytes`].

use serde_json::{Value, json};

use crate::engine::{
    Committed, DiffEntry, DiffKind, ForkInfo, ListEntry, MountInfo, VersionInfo, VolumeInfo,
};
use crate::protocol::{Bytes, Mount};

/// A time in nanoseconds since 1970.
fn time(nanos: i64) -> Value {
    match jiff::Timestamp::from_nanosecond(i128::from(nanos)) {
        Ok(time) => json!(time.to_string()),
        Err(_) => Value::Null,
    }
}

fn bytes(bytes: &[u8]) -> Bytes {
    Bytes(bytes.to_vec())
}

pub fn mount(mount: &MountInfo) -> Value {
    let path = bytes(mount.path.as_bytes());
    json!(Mount {
        path,
        device: mount.dev,
        created: mount.created
    })
}

pub fn mounts(mounts: &[MountInfo]) -> Value {
    mounts.iter().map(mount).collect()
}

pub fn volume(volume: &VolumeInfo) -> Value {
    json!({
        "name": volume.name,
        "head": volume.head,
        "versions": volume.versions,
        "created": time(volume.created),
        "used": time(volume.used),
        "files": volume.files,
        "logical_bytes": volume.logical_bytes,
        "forks": volume.forks,
    })
}

pub fn version(version: &VersionInfo) -> Value {
    json!({
        "volume": version.volume,
        "number": version.number,
        "id": version.id,
        "time": time(version.time),
        "base": version.base,
        "previous": version.previous,
        "head": version.head,
        "pinned": version.pinned,
        "damaged": version.damaged,
        "job": version.job,
        "labels": version.labels,
        "message": version.message,
        "files": version.files,
        "logical_bytes": version.logical_bytes,
        "new_bytes": version.new_bytes,
    })
}

pub fn fork(fork: &ForkInfo) -> Value {
    json!({
        "id": fork.id,
        "state": fork.state,
        "volume": fork.volume,
        "base": fork.base,
        "mount": fork.mount.as_ref().map(mount),
        "job": fork.job,
        "created": time(fork.created),
        "age": fork.age,
        "uid": fork.uid,
        "gid": fork.gid,
        "read_only": fork.read_only,
        "ephemeral": fork.ephemeral,
        "suid": fork.suid,
        "dev": fork.dev,
        "size": fork.size,
        "changed": fork.changed,
        "bytes": fork.bytes,
        "requests": fork.requests,
    })
}

pub fn commit(commit: &Committed) -> Value {
    json!({
        "fork": commit.fork.to_string(),
        "version": commit.version.as_ref().map(version),
        "mount": commit.mount.as_ref().map(mount),
    })
}

pub fn entry(entry: &ListEntry) -> Value {
    json!({
        "name": bytes(&entry.name),
        "ino": entry.ino,
        "mode": entry.mode,
        "uid": entry.uid,
        "gid": entry.gid,
        "size": entry.size,
        "mtime": time(entry.mtime),
        "nlink": entry.nlink,
        "target": entry.target.as_deref().map(bytes),
    })
}

pub fn change(change: &DiffEntry) -> Value {
    let kind = match change.kind {
        DiffKind::Added => "added",
        DiffKind::Removed => "removed",
        DiffKind::Changed => "changed",
        DiffKind::Renamed => "renamed",
    };
    json!({
        "kind": kind,
        "path": bytes(&change.path),
        "from": change.from.as_deref().map(bytes),
        "old_size": change.old_size,
        "new_size": change.new_size,
    })
}

/// The documents of a list.
pub fn list<T>(items: &[T], one: impl Fn(&T) -> Value) -> Value {
    items.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc_3339() {
        assert_eq!(time(0), json!("1970-01-01T00:00:00Z"));
        assert_eq!(time(1_500_000_000), json!("1970-01-01T00:00:01.5Z"));
    }

    #[test]
    fn paths_may_be_any_bytes() {
        let entry = DiffEntry {
            kind: DiffKind::Renamed,
            path: b"a/\xff".to_vec(),
            from: Some(b"b".to_vec()),
            old_size: 1,
            new_size: 2,
        };
        let expected = json!({"kind": "renamed", "path": {"b64": "YS//"}, "from": "b", "old_size": 1, "new_size": 2});
        assert_eq!(change(&entry), expected);
    }
}
