//! The daemon's log: five files of at most 10 MiB in the store, or standard error where somebody else keeps it.

use std::io::{self, Write};
use std::path::PathBuf;

use flexi_logger::{
    Cleanup, Criterion, DeferredNow, FileSpec, FlexiLoggerError, Logger, Naming, Record,
};

use crate::protocol::{Code, Failure};

const FILE_SIZE: u64 = 10 << 20;
/// Beside the file being written.
const OLD_FILES: usize = 4;

/// Starts logging, at the level of `FORKVOL_LOG` (default: info).
pub fn start(dir: Option<PathBuf>) -> Result<(), Failure> {
    let failed = |error: FlexiLoggerError| {
        Failure::new(Code::Failed, format!("cannot start the log: {error}"))
    };
    let level = std::env::var("FORKVOL_LOG").unwrap_or_else(|_| "info".into());
    let logger = Logger::try_with_str(level).map_err(failed)?.format(line);
    let logger = match dir {
        None => logger.log_to_stderr(),
        Some(dir) => to_files(logger, dir, FILE_SIZE),
    };
    // The handle only reconfigures; without it the log goes on.
    logger.start().map_err(failed)?;
    // A panic ends the process: what it was about to change is in no state to be served. The logs of the forks have the rest.
    std::panic::set_hook(Box::new(|panic| {
        ::log::error!("{panic}");
        ::log::logger().flush();
        crate::mount::end_pushing();
        std::process::abort();
    }));
    Ok(())
}

/// A file, and a bounded number of older ones beside it.
fn to_files(logger: Logger, dir: PathBuf, size: u64) -> Logger {
    let file = FileSpec::default()
        .directory(dir)
        .basename("daemon")
        .suppress_timestamp();
    logger
        .log_to_file(file)
        .append()
        .cleanup_in_background_thread(false)
        .rotate(
            Criterion::Size(size),
            Naming::Numbers,
            Cleanup::KeepLogFiles(OLD_FILES),
        )
}

fn line(out: &mut dyn Write, _: &mut DeferredNow, record: &Record) -> io::Result<()> {
    let thread = std::thread::current();
    write!(
        out,
        "{:.3} {} [{}] {}",
        jiff::Timestamp::now(),
        record.level(),
        thread.name().unwrap_or("-"),
        record.args()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_bounded_and_keeps_what_is_newest() {
        let dir = tempfile::tempdir().unwrap();
        for run in 0..2 {
            let logger = Logger::try_with_str("info").unwrap().format(line);
            let (log, _handle) = to_files(logger, dir.path().into(), 1000).build().unwrap();
            for n in 0..200 {
                log.log(
                    &Record::builder()
                        .level(::log::Level::Info)
                        .args(format_args!("line {n} of run {run}"))
                        .build(),
                );
            }
            log.flush();
        }
        let files: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        assert_eq!(files.len(), OLD_FILES + 1, "{files:?}");
        let texts: Vec<String> = files
            .iter()
            .map(|file| std::fs::read_to_string(file).unwrap())
            .collect();
        assert!(texts.iter().all(|text| text.len() < 1200));
        assert!(texts.iter().any(|text| text.contains("line 199 of run 1")));
        assert!(!texts.iter().any(|text| text.contains("of run 0")));
        assert_eq!((FILE_SIZE, OLD_FILES + 1), (10 << 20, 5));
    }
}
