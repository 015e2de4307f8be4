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
        Some(dir) => logger
            .log_to_file(
                FileSpec::default()
                    .directory(dir)
                    .basename("daemon")
                    .suppress_timestamp(),
            )
            .append()
            .cleanup_in_background_thread(false)
            .rotate(
                Criterion::Size(FILE_SIZE),
                Naming::Numbers,
                Cleanup::KeepLogFiles(OLD_FILES),
            ),
    };
    // The handle only reconfigures; without it the log goes on.
    logger.start().map_err(failed)?;
    // A panic ends the process: what it was about to change is in no state to be served. The logs of the forks have the rest.
    std::panic::set_hook(Box::new(|panic| {
        ::log::error!("{panic}");
        ::log::logger().flush();
        std::process::abort();
    }));
    Ok(())
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
