//! Content without a mount: export, import, cat, ls.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Context;
use super::client::Client;
use super::forks::take;
use super::output::{self, warn};
use super::volumes::version_name;
use crate::protocol::{Bytes, Code, Failure, Request};
use crate::sys;

/// What a compressed file begins with.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const ZSTD_LEVEL: i32 = 3;

fn cannot_read(path: &Path, error: &io::Error) -> Failure {
    let message = format!("cannot read {}: {}", path.display(), output::reason(error));
    Failure::new(Code::Failed, message)
}

/// Why a file could not be written, in a folder that may be missing.
fn cannot_write(path: &Path, error: &io::Error) -> Failure {
    let folder = path.parent().filter(|f| !f.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new(".")).display();
    let (why, hint) = match error.kind() {
        io::ErrorKind::NotFound => (
            format!("there is no folder {folder}"),
            Some("make it, or name another file"),
        ),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => (
            format!("the folder {folder} may not be written to"),
            Some("name a file in a folder of your own"),
        ),
        _ => (output::reason(error), None),
    };
    let failure = Failure::new(
        Code::Failed,
        format!("cannot write {}: {why}", path.display()),
    );
    Failure {
        hint: hint.map(str::to_owned),
        ..failure
    }
}

/// `VERSION:PATH`; a version has no colon in it.
fn split(text: &OsStr) -> Result<(String, Option<Bytes>), Failure> {
    let bytes = text.as_bytes();
    let at = bytes.iter().position(|b| *b == b':');
    let (version, path) = match at {
        Some(at) => (&bytes[..at], Some(Bytes(bytes[at + 1..].to_vec()))),
        None => (bytes, None),
    };
    match str::from_utf8(version) {
        Ok(version) if !version.is_empty() => Ok((version.into(), path)),
        _ => Err(
            Failure::new(Code::Usage, format!("{} names no version", text.display()))
                .hint("write VERSION:PATH"),
        ),
    }
}

pub fn cat(context: &Context, file: &OsStr) -> Result<(), Failure> {
    let (version, Some(path)) = split(file)? else {
        return Err(
            Failure::new(Code::Usage, format!("{} names no file", file.display()))
                .hint("write VERSION:PATH"),
        );
    };
    let mut out = io::stdout().lock();
    context
        .connect()?
        .fetch(&Request::Cat { version, path }, &mut out, None)?;
    out.flush().map_err(|e| output::cannot_print(&e))
}

pub fn ls(context: &Context, folder: &OsStr) -> Result<(), Failure> {
    let (version, path) = split(folder)?;
    let path = path.unwrap_or(Bytes(Vec::new()));
    let answer = context.ask(&Request::List { version, path })?;
    let entries: Vec<Value> = take(&answer, "/entries")?;
    output::show(context.json, &answer, |_| {
        entries.iter().map(entry_line).collect()
    })
}

fn entry_line(entry: &Value) -> String {
    let number = |name: &str| entry[name].as_u64().unwrap_or(0);
    let target = match &entry["target"] {
        Value::Null => String::new(),
        target => format!(" -> {}", output::path_text(target)),
    };
    let time = entry["mtime"]
        .as_str()
        .and_then(|t| t.get(..19))
        .unwrap_or("-");
    format!(
        "{} {:>5} {:>5} {:>10} {time} {}{target}\n",
        mode_text(number("mode") as u32),
        number("uid"),
        number("gid"),
        number("size"),
        output::path_text(&entry["name"]),
    )
}

/// A mode as ls(1) writes it.
fn mode_text(mode: u32) -> String {
    let kind = match mode >> 12 {
        0o01 => 'p',
        0o02 => 'c',
        0o04 => 'd',
        0o06 => 'b',
        0o12 => 'l',
        0o14 => 's',
        _ => '-',
    };
    let mut text = String::from(kind);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & 1 != 0, mode & special != 0) {
            (true, true) => letter,
            (false, true) => letter.to_ascii_uppercase(),
            (true, false) => 'x',
            (false, false) => '-',
        });
    }
    text
}

pub fn export(context: &Context, version: String, output: &Path) -> Result<(), Failure> {
    let mut client = context.connect()?;
    let request = Request::Export { version };
    if output == Path::new("-") || is_standard_output(output) {
        let mut out = output::progress(None).wrap_write(io::stdout().lock());
        let answer = client.fetch(&request, &mut out, None)?;
        out.flush().map_err(|e| output::cannot_print(&e))?;
        return tell(&answer);
    }
    let there = match fs::metadata(output) {
        Ok(there) if there.is_dir() => {
            let message = format!("cannot write {}: it is a folder", output.display());
            return Err(Failure::new(Code::Failed, message).hint("name a file in it"));
        }
        Ok(there) => Some(there),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(cannot_write(output, &e)),
    };
    // A device or a pipe stays what it is.
    if there.as_ref().is_some_and(|there| !there.is_file()) {
        let file = File::options().write(true).open(output);
        let file = file.map_err(|e| cannot_write(output, &e))?;
        return tell(&fill(&mut client, &request, output, &file)?);
    }
    // Under its name only when it is whole.
    let to = led_to(output).map_err(|e| cannot_write(output, &e))?;
    let failed = |e: io::Error| cannot_write(&to, &e);
    let (file, partial) = beside(&to, there.as_ref()).map_err(failed)?;
    let written = fill(&mut client, &request, output, &file).and_then(|answer| {
        file.sync_all().map_err(failed)?;
        fs::rename(&partial, &to).map_err(failed)?;
        Ok(answer)
    });
    if written.is_err() {
        fs::remove_file(&partial).map_err(|e| cannot_write(&partial, &e))?;
    }
    tell(&written?)
}

/// Writes what is asked for into a file, compressed if it is called so.
fn fill(
    client: &mut Client,
    request: &Request,
    path: &Path,
    mut file: &File,
) -> Result<Value, Failure> {
    let is_compressed = path.extension().is_some_and(|e| e == "zst" || e == "tzst");
    if !is_compressed {
        let mut counted = output::progress(None).wrap_write(&mut file);
        return client.fetch(request, &mut counted, Some(path));
    }
    let failed = |e: io::Error| cannot_write(path, &e);
    let mut encoder = zstd::stream::Encoder::new(file, ZSTD_LEVEL).map_err(failed)?;
    let mut counted = output::progress(None).wrap_write(&mut encoder);
    let answer = client.fetch(request, &mut counted, Some(path))?;
    encoder.finish().map_err(failed)?;
    Ok(answer)
}

/// Whether a path is what standard output leads to already, as `/dev/stdout` is: who opened it may go on writing there.
fn is_standard_output(path: &Path) -> bool {
    let file = |path: &Path| fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
    file(path).is_some_and(|it| file(Path::new("/proc/self/fd/1")) == Some(it))
}

/// Where a path leads, which ends at a file or at nothing.
fn led_to(path: &Path) -> io::Result<PathBuf> {
    let mut at = path.to_owned();
    while let Ok(target) = fs::read_link(&at) {
        at.pop();
        at.push(target);
    }
    let folder = at.parent().filter(|f| !f.as_os_str().is_empty());
    let folder = fs::canonicalize(folder.unwrap_or(Path::new(".")))?;
    Ok(folder.join(at.file_name().unwrap_or_default()))
}

/// A new file beside another, of which it takes the place later: as open to others as that is.
fn beside(path: &Path, there: Option<&Metadata>) -> io::Result<(File, PathBuf)> {
    let name = format!(".forkvol-{:016x}", u64::from_ne_bytes(sys::random()?));
    let partial = path.with_file_name(name);
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(if there.is_some() { 0o600 } else { 0o666 })
        .open(&partial)?;
    if let Some(there) = there {
        // Only root may give a file away.
        fchown(&file, Some(there.uid()), Some(there.gid())).ok();
        file.set_permissions(there.permissions())?;
    }
    Ok((file, partial))
}

/// Says what a tar file could not hold.
fn tell(answer: &Value) -> Result<(), Failure> {
    for warning in take::<Option<Vec<String>>>(answer, "/warnings")?.unwrap_or_default() {
        warn(&warning);
    }
    Ok(())
}

/// Names the file in what the daemon says of its content.
fn of_file(file: &Path, failure: Failure) -> Failure {
    let unnamed = ["the tar file:", "cannot send the content:"];
    match unnamed
        .iter()
        .find_map(|start| failure.message.strip_prefix(start))
    {
        Some(what) if file != Path::new("-") => Failure {
            message: format!("cannot import {}:{what}", file.display()),
            ..failure
        },
        _ => failure,
    }
}

pub fn import(context: &Context, volume: String, file: &Path) -> Result<(), Failure> {
    let failed = |e: io::Error| cannot_read(file, &e);
    let input: Box<dyn Read> = match file == Path::new("-") {
        true => Box::new(output::progress(None).wrap_read(io::stdin().lock())),
        false => {
            let file = File::open(file).map_err(failed)?;
            let total = file.metadata().map_err(failed)?.len();
            Box::new(output::progress(Some(total)).wrap_read(file))
        }
    };
    let mut input = BufReader::with_capacity(256 << 10, input);
    let mut head = Vec::new();
    input
        .by_ref()
        .take(ZSTD_MAGIC.len() as u64)
        .read_to_end(&mut head)
        .map_err(failed)?;
    let is_compressed = head == ZSTD_MAGIC;
    let whole = io::Cursor::new(head).chain(input);
    let mut content: Box<dyn Read> = match is_compressed {
        true => Box::new(zstd::stream::Decoder::new(whole).map_err(failed)?),
        false => Box::new(whole),
    };
    let answer = context
        .connect()?
        .send(&Request::Import { volume }, &mut content)
        .map_err(|failure| of_file(file, failure))?;
    tell(&answer)?;
    output::show(context.json, &answer, version_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_and_a_path_are_split_at_the_first_colon() {
        let of = |text: &str| split(OsStr::new(text)).map_err(|f| f.code);
        assert_eq!(of("npm@3"), Ok(("npm@3".into(), None)));
        assert_eq!(
            of("npm:a:b"),
            Ok(("npm".into(), Some(Bytes(b"a:b".to_vec()))))
        );
        assert_eq!(of(":a"), Err(Code::Usage));
        let raw = OsStr::from_bytes(b"npm:\xff");
        assert_eq!(split(raw).unwrap().1, Some(Bytes(vec![0xff])));
    }

    #[test]
    fn modes_are_written_as_ls_does() {
        for (mode, text) in [
            (0o100_644, "-rw-r--r--"),
            (0o040_755, "drwxr-xr-x"),
            (0o104_755, "-rwsr-xr-x"),
            (0o041_777, "drwxrwxrwt"),
            (0o102_644, "-rw-r-Sr--"),
            (0o120_777, "lrwxrwxrwx"),
        ] {
            assert_eq!(mode_text(mode), text);
        }
    }
}
