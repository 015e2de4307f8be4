import { createRoot } from "react-dom/client";
import Button from "@mui/material/Button";
import { range } from "lodash";

function Page() {
  return (
    <ul>
      {range(3).map((n) => (
        <li key={n}>
          <Button variant="contained">fork {n}</Button>
        </li>
      ))}
    </ul>
  );
}

createRoot(document.getElementById("root")!).render(<Page />);
